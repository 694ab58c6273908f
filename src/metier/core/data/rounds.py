"""Sources that let the model answer: each epoch is a round, made with the weights of its beginning and written down.

What a round made stands in ``rounds/round-0001.jsonl`` of the run's folder: it can be read by people, and a resumed run
reads it instead of making it again, with weights that meanwhile are others. A source whose ``round`` returns ``None`` has
nothing more to give: the data, and with them the run, end there.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metier.core.data import formats
from metier.core.data.examples import Completion, Crossed, Example, Judged, Message, Preference, Ranked
from metier.core.errors import MetierError, UsageError
from metier.core.policy import Policy

FORMATS = {
    Preference: "preference", Ranked: "ranked", Judged: "unpaired", Completion: "prompt-completion", Crossed: "crossed",
}  # fmt: skip


def stream(
    source: Any, inputs: Mapping[str, Sequence[Example]], policy: Policy, wanted: tuple[type, ...], *,
    epoch: int, rng: np.random.Generator, notice: Callable[[str], None],
) -> Iterator[Example]:  # fmt: skip
    """The examples of round ``epoch + 1``: read when the run has made them before, else made by ``source.round`` and kept.

    The first process runs the source and writes; what it asks of the policy is shared by all processes, with whole weights in
    each while the round is made. Raises ``UsageError`` for examples that the objective cannot read.
    """
    path, engine = place(policy.folder, epoch), policy.engine

    def make() -> None:
        began = time.monotonic()
        given = source.round(inputs, policy=policy, round=epoch, rng=rng)
        made, left_out = _usable([] if given is None else list(given))
        if given is not None:
            _check(made, wanted, source, epoch)
        _write(path, made)
        said = f"round {epoch + 1}: {len(made)} examples made in {time.monotonic() - began:.1f} s, kept in {path.name}"
        notice(f"{said}; {left_out}" if left_out else said)

    if engine.main and epoch == 0 and not any((policy.folder / "checkpoints").glob("step-*")):
        _forget(path.parent)
    if engine.any(engine.main and not path.is_file()):
        with engine.whole():
            policy.together(make)
    engine.barrier()
    yield from _read(path)


def _forget(folder: Path) -> None:
    """Remove the rounds of a start that came to no checkpoint: its settings may have been others."""
    for path in folder.glob("round-*.jsonl"):
        path.unlink()


def place(folder: Path, round: int) -> Path:
    """Where a run keeps what its round ``round`` (from 0) made."""
    return folder / "rounds" / f"round-{round + 1:04d}.jsonl"


def number(id: str) -> int:
    """The round, from 1, that an example belongs to by its id; 0 for one that no round has made."""
    found = re.match(r"round-(\d+)\.jsonl:", id)
    return int(found[1]) if found else 0


def made(folder: Path, round: int) -> list[Example]:
    """The examples of an earlier round (from 0) of the run in ``folder``."""
    return list(_read(place(folder, round)))


def _usable(made: list[Example]) -> tuple[list[Example], str]:
    """The examples that can be trained on (a model may answer with nothing), and how many others were left out, and why."""
    found, reasons = [], Counter[str]()
    for e in made:
        row = to_row(e)
        try:
            formats.convert(row, row.pop("format"))
        except formats.BadRow as problem:
            reasons[str(problem)] += 1
        else:
            found.append(e)
    return found, ", ".join(f"{n} left out ({why})" for why, n in reasons.items())


def _check(made: list[Example], wanted: tuple[type, ...], source: Any, epoch: int) -> None:
    name = source.__metier__.id
    if not made:
        raise MetierError(f"{name} made no example in round {epoch + 1}")
    if not isinstance(made[0], wanted):
        kinds = " or ".join(k.__name__.lower() for k in wanted)
        raise UsageError(f"{name} makes {type(made[0]).__name__.lower()} examples, but the objective reads {kinds}")


def _write(path: Path, made: list[Example]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(to_row(e), ensure_ascii=False) + "\n" for e in made)
    aside = path.with_suffix(".part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _read(path: Path) -> Iterator[Example]:
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        yield formats.convert(row, row.pop("format"), id=f"{path.name}:{i + 1}")


def to_row(e: Any) -> dict[str, Any]:
    """An example as the row of a file, its format included."""
    format = formats.lookup(FORMATS[type(e)])
    fields = {k: _plain(v) for k, v in vars(e).items() if k not in ("id", "meta") and v not in (None, ())}
    # what the row of the prompt said under the same names (another answer, its score) is no longer about this example
    meta = {k: v for k, v in e.meta.items() if k not in {"format", *format.needs, *format.takes}}
    return {"format": format.name, **fields, **meta}


def _plain(value: Any) -> Any:
    if isinstance(value, Message):
        return {"role": value.role, "content": value.content}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
