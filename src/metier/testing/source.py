"""What every source must do: the same stream from the same seed, continued from any place, nothing without an
origin.

A source reads at least one kind of example. Every example it gives has the id of one of its inputs, or that
id followed by ``#…`` when it was made from it. Sources that sample from the policy are only constructed here.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from metier.core.data import formats
from metier.core.errors import UsageError
from metier.testing._sample import sample

MOST = 400
"""Examples looked at; a stream may be endless."""
SIZES = {"a": 7, "b": 4}


def check(id: str) -> list[str]:
    """Run the suite on the source ``id``. Returns the names of the checks; raises ``AssertionError``."""
    if "policy" in sample(id).card.needs:
        return ["options"]
    readable = [inputs for inputs in _kinds_of_inputs() if _reads(id, inputs)]
    assert readable, f"{id} reads no kind of example"
    for inputs in readable:
        before = {name: list(rows) for name, rows in inputs.items()}
        whole = _run(id, inputs)
        _deterministic(id, inputs, whole)
        _resumable(id, inputs, whole)
        _nothing_invented(id, inputs, whole)
        assert before == {name: list(rows) for name, rows in inputs.items()}, f"{id} changed its inputs"
    return ["options", "deterministic", "resumable", "nothing invented", "inputs unchanged"]


def _run(
    id: str, inputs: Mapping[str, Sequence[Any]], *, seed: int = 0, epoch: int = 0,
    progress: Callable[[int], float] = lambda given: given / 20,
) -> list[Any]:  # fmt: skip
    given: list[Any] = []
    rng = np.random.default_rng([seed, epoch])
    stream = sample(id).obj.stream(inputs, epoch=epoch, rng=rng, progress=lambda: min(progress(len(given)), 1.0))
    for example in islice(stream, MOST):
        given.append(example)
    return given


def _reads(id: str, inputs: Mapping[str, Sequence[Any]]) -> bool:
    try:
        return bool(_run(id, inputs))
    except UsageError:
        return False


def _deterministic(id: str, inputs: Mapping[str, Sequence[Any]], whole: list[Any]) -> None:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    assert _run(id, inputs) == whole, f"{id}: the stream depends on more than rng, epoch and inputs"
    assert random.getstate() == python_state, f"{id} draws from Python's global generator"
    assert torch.equal(torch.get_rng_state(), torch_state), f"{id} draws from torch's global generator"


def _resumable(id: str, inputs: Mapping[str, Sequence[Any]], whole: list[Any]) -> None:
    """A resumed run skips what was used; what is skipped may see any progress, but must not change what
    follows.
    """
    for skipped in (1, len(whole) // 2):
        again = _run(id, inputs, progress=lambda n, k=skipped: 0.99 if n < k else n / 20)
        assert again[skipped:] == whole[skipped:], f"{id}: after skipping {skipped} examples the stream continues differently"


def _nothing_invented(id: str, inputs: Mapping[str, Sequence[Any]], whole: list[Any]) -> None:
    known = {e.id for rows in inputs.values() for e in rows}
    for e in whole:
        assert e.id.split("#")[0] in known, f"{id} gave {e.id!r}, which is not from its inputs"


def _kinds_of_inputs() -> Iterator[dict[str, list[Any]]]:
    for make in MAKERS.values():
        yield {name: [make(f"{name}:{i}", i) for i in range(n)] for name, n in SIZES.items()}


def _meta(i: int) -> dict[str, Any]:
    site = f"https://site{i % 3}.example/"
    return {"path": f"{site}page{i}", "url": site, "source": f"s{i % 2}", "answer": str(i)}


MAKERS: dict[str, Callable[[str, int], Any]] = {
    "text": lambda id, i: formats.Text(text=f"text {i} of {id}", id=id, meta=_meta(i)),
    "completion": lambda id, i: formats.Completion(prompt=f"ask {id}", completion=f"answer {i}", id=id, meta=_meta(i)),
    "preference": lambda id, i: formats.Preference(
        prompt=f"ask {id}", chosen=f"good {i}", rejected=f"bad {i}", id=id, meta=_meta(i), margin=None
    ),
}
