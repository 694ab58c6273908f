"""The run folder: its record ``run.json``, and results that appear only when they are complete."""

import json
import math
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FORMAT = 1


def environment() -> dict[str, Any]:
    """Versions and machine facts that a result depends on."""
    packages = {}
    for name in ("metier", "torch", "transformers", "tokenizers", "peft", "datasets", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "packages": packages,
    }


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8") as f:
        json.dump(finite(value), f, indent=1, ensure_ascii=False, allow_nan=False)
        f.flush()
        os.fsync(f.fileno())
    _usual_permissions(Path(f.name))
    Path(f.name).replace(path)


def finite(value: Any) -> Any:
    """The same JSON-able value with ``None`` for every number that is not finite."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def publish(target: Path, fill: Callable[[Path], None]) -> Path:
    """Fill a folder aside, then move it to ``target``; on an error nothing is left behind."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.tmp-"))
    try:
        fill(aside)
        _usual_permissions(aside)
        if target.exists():
            old = aside.with_name(aside.name + "-old")
            target.replace(old)
            aside.replace(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            aside.replace(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return target


def _usual_permissions(path: Path) -> None:
    """Temporary files and folders are private; a result is as readable as any new file."""
    mask = os.umask(0)
    os.umask(mask)
    for each in (path, *path.rglob("*")):
        each.chmod((0o777 if each.is_dir() else 0o666) & ~mask)


def command_line() -> list[str]:
    """How this process was started, with the program's name instead of its path."""
    program = Path(sys.argv[0]).name
    return [*(["python", "-m", "metier"] if program == "__main__.py" else [program]), *sys.argv[1:]]
