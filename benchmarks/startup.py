"""How long the verbs that only read take, beside an empty Python start.

python benchmarks/startup.py [--json]
"""

import argparse
import json
import subprocess
import sys
import time
from statistics import median

ROUNDS = 7
COMMANDS = {
    "python": ["-c", "pass"],
    "metier list": ["-m", "metier", "list"],
    "metier rows": ["-m", "metier", "rows"],
    "metier --help": ["-m", "metier", "--help"],
}


def seconds(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    found = {name: median(values) for name, values in times.items()}
    if given.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name}: {1000 * value:.0f} ms")
    print("times an empty start: " + ", ".join(f"{n} {v / found['python']:.1f}" for n, v in found.items() if n != "python"))


if __name__ == "__main__":
    main()
