"""What every source must do: the same examples from the same seed, continued from any place, nothing without an origin.

A source reads at least one kind of example; one that says in ``takes`` which, reads each of these. Inputs are two lists of
unequal length, called ``a`` and ``b``, or as ``NAMES`` of the source's module says.

*Streams*: every example has the id of one of the inputs, or that id followed by ``#…`` when it was made from it. *Rounds*, of
sources with ``needs=("policy",)``: a small model answers in two rounds; every example keeps what its row said (``meta``) and
can be written down and read back; nothing but the folder carries over from one round to the next.
"""

import copy
import inspect
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metier.core import part
from metier.core.data import formats, rounds
from metier.core.data.examples import (
    BadRow,
    Chat,
    Completion,
    Crossed,
    Example,
    Judged,
    Labelled,
    Message,
    Preference,
    Prompted,
    Ranked,
    Text,
)
from metier.core.errors import UsageError
from metier.core.part import Built
from metier.core.policy import Policy
from metier.testing import _policy
from metier.testing._sample import sample
from metier.testing._tiny import same, weights

MOST = 400
"""Examples looked at; a stream may be endless."""
SIZES = (7, 4)
SEEDS = 4
"""Other seeds that are tried: a few rows may come out alike by chance."""
SHORT = {"prompts": 6, "max_new_tokens": 24, "pool": 4}
"""Options that keep rounds short, for the sources that have them."""
JUDGING = ("reward", "judge")
"""Options that name a reward part; the suite gives one that tells most texts apart."""
REWARD = {"length": {"unit": "characters"}}

Inputs = Mapping[str, Sequence[Any]]


def check(id: str, **options: Any) -> list[str]:
    """Run the suite on the source ``id``, with its defaults or other ``options``.

    Returns the names of the checks; raises ``AssertionError``.
    """
    case = Case(id, options)
    built = case.made()
    if "policy" in built.needs:
        return _check_rounds(case, getattr(built.obj, "takes", ()))
    readable = [inputs for kind in _kinds(built) if _reads(case, inputs := _inputs(case, kind), must=hasattr(built.obj, "takes"))]
    assert readable, f"{case} reads no kind of example"
    for inputs in readable:
        with _unchanged(case, inputs):
            whole = _run(case, inputs)
            _follows_the_seed(
                case, whole, "the stream depends on more", lambda seed, rng, i=inputs: _run(case, i, seed=seed, rng=rng)
            )
            _resumable(case, inputs, whole)
            _read_again(case, inputs, whole)
        _nothing_invented(case, inputs, whole)
        for e in whole:
            _valid(case, e)
    return [
        "options", *(f"reads {type(_first(i)).__name__.lower()}" for i in readable), "deterministic", "another seed", "resumable",
        "read again", "nothing invented", "valid examples", "inputs unchanged",
    ]  # fmt: skip


# --- inputs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A source with the options that it is tried with."""

    id: str
    given: Mapping[str, Any]

    def __str__(self) -> str:
        return self.id

    def made(self) -> Built:
        """A new object, with options that keep it short."""
        options = part.options(part.load(self.id))
        short = {n: v for n, v in SHORT.items() if n in options}
        judged = {n: REWARD for n in JUDGING if n in options}
        return sample(self.id, **{**short, **judged, **self.given})


def _kinds(built: Built) -> tuple[type, ...]:
    return getattr(built.obj, "takes", tuple(MAKERS))


def _inputs(case: Case, kind: type) -> dict[str, list[Any]]:
    names = getattr(inspect.getmodule(part.load(case.id)), "NAMES", ("a", "b"))
    return {name: [MAKERS[kind](f"{name}:{i}", i, k) for i in range(SIZES[k])] for k, name in enumerate(names)}


def _first(inputs: Inputs) -> Any:
    return next(iter(inputs.values()))[0]


def _meta(id: str, i: int) -> dict[str, Any]:
    site = f"https://site{i % 3}.example/"
    return {"path": f"{site}page{i}", "url": site, "source": f"s{i % 2}", "answer": str(i), "row": id}


def _prompted(id: str, i: int, k: int) -> Prompted:
    return Prompted(f"ask {id}", id=id, meta={**_meta(id, i), "completions": [f"short {i}", f"a longer answer {i}"]})


def _ranked(id: str, i: int, k: int) -> Ranked:
    """Three answers in the first input, two in the second."""
    texts, scores = (f"good {i}", f"bad {i}", f"so so {i}")[: 3 - k], (1.0, -0.5, 0.25)[: 3 - k]
    return Ranked(f"ask {id}", texts, scores, id=id, meta=_meta(id, i))


def _crossed(id: str, i: int, k: int) -> Crossed:
    return Crossed((f"be brief {id}", f"be long {id}"), (f"short {i}", f"a long answer {i}"), id=id, meta=_meta(id, i))


def _chat(id: str, i: int, k: int) -> Chat:
    return Chat((Message("user", f"ask {id}"), Message("assistant", f"answer {i}")), id=id, meta=_meta(id, i))


MAKERS: dict[type, Callable[[str, int, int], Any]] = {
    Text: lambda id, i, k: Text(f"text {i} of {id}", id=id, meta=_meta(id, i)),
    Chat: _chat,
    Completion: lambda id, i, k: Completion(f"ask {id}", f"answer {i}", id=id, meta=_meta(id, i)),
    Preference: lambda id, i, k: Preference(f"ask {id}", f"good {i}", f"bad {i}", id=id, meta=_meta(id, i)),
    Prompted: _prompted,
    Judged: lambda id, i, k: Judged(f"ask {id}", f"answer {i}", i % 2 == 0, id=id, meta=_meta(id, i)),
    Ranked: _ranked,
    Crossed: _crossed,
    Labelled: lambda id, i, k: Labelled(f"text {i} of {id}", None, i % 3, id=id, meta=_meta(id, i)),
}
"""Example type -> one with the given id, by its place in an input and which input it is (0 or 1)."""


# --- what both kinds of sources must do ------------------------------------------------------------------------


@contextmanager
def _unchanged(case: Case, inputs: Inputs) -> Iterator[None]:
    """Neither inputs nor global generators are touched meanwhile."""
    before, torch_state = copy.deepcopy(inputs), torch.get_rng_state()
    python_state, numpy_state = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    yield
    assert inputs == before, f"{case} changed its inputs"
    assert random.getstate() == python_state, f"{case} draws from Python's global generator"
    assert np.random.get_state()[1].tolist() == numpy_state, f"{case} draws from numpy's global generator"  # type: ignore[index,union-attr]
    assert torch.equal(torch.get_rng_state(), torch_state), f"{case} draws from torch's global generator"


def _follows_the_seed(case: Case, whole: Any, what: str, run: Callable[[int, np.random.Generator], Any]) -> None:
    """The same seed gives the same; another one gives something else, unless the source draws no random numbers."""
    rng, untouched = np.random.default_rng([0, 0]), np.random.default_rng([0, 0])
    assert run(0, rng) == whole, f"{case}: {what} than rng, epoch and inputs"
    if _state(rng) != _state(untouched):
        others = (run(seed, np.random.default_rng([seed, 0])) for seed in range(1, 1 + SEEDS))
        assert any(other != whole for other in others), f"{case} draws random numbers, but every seed gives the same"


def _state(rng: np.random.Generator) -> tuple[str, int]:
    seeds: Any = rng.bit_generator.seed_seq
    return repr(rng.bit_generator.state), seeds.n_children_spawned


def _valid(case: Case, e: Any) -> None:
    """An example that the rest of the library can use."""
    assert isinstance(e, Example), f"{case} gave a {type(e).__name__}, which is no example"
    if type(e) in rounds.FORMATS:
        try:
            _read_back(case, replace(e, meta={}))
        except BadRow as problem:
            raise AssertionError(f"{case} gave an example that cannot be used: {problem}") from None


def _read_back(case: Case, e: Any) -> Any:
    """The example as a file of a round keeps it. Raises ``BadRow`` for one that the core leaves out."""
    try:
        row = json.loads(json.dumps(rounds.to_row(e), allow_nan=False))
    except (TypeError, ValueError) as problem:
        raise AssertionError(f"{case}: {type(e).__name__} {e.id} cannot be written down as JSON: {problem}") from None
    found = formats.convert(row, row.pop("format"), id=e.id)
    assert replace(found, meta={}) == replace(e, meta={}), f"{case}: written down and read back, {e} is {found}"
    return found


# --- streams -------------------------------------------------------------------------------------------------


def _run(
    case: Case, inputs: Inputs, *, seed: int = 0, epoch: int = 0, rng: np.random.Generator | None = None, source: Any = None,
    progress: Callable[[int], float] = lambda given: given / 20,
) -> list[Any]:  # fmt: skip
    given: list[Any] = []
    source = source or case.made().obj
    rng = rng or np.random.default_rng([seed, epoch])
    stream = source.stream(inputs, epoch=epoch, rng=rng, progress=lambda: min(progress(len(given)), 1.0))
    for example in islice(stream, MOST):
        given.append(example)
    return given


def _reads(case: Case, inputs: Inputs, *, must: bool) -> bool:
    """Whether the source reads such inputs, and it must if it says so."""
    problem: Any = "it gives nothing for it"
    try:
        with _unchanged(case, inputs):
            if _run(case, inputs):
                return True
    except UsageError as e:
        problem = e
    assert not must, f"{case} says that it takes {type(_first(inputs)).__name__}: {problem}"
    return False


def _resumable(case: Case, inputs: Inputs, whole: list[Any]) -> None:
    """A resumed run skips what was used; what is skipped may see any progress, but must not change what
    follows.
    """
    for skipped in (1, len(whole) // 2):
        again = _run(case, inputs, progress=lambda n, k=skipped: 0.99 if n < k else n / 20)
        assert again[skipped:] == whole[skipped:], f"{case}: after skipping {skipped} examples the stream continues differently"


def _read_again(case: Case, inputs: Inputs, whole: list[Any]) -> None:
    """A run that goes on reads one object epoch after epoch; a resumed one begins in the middle with a new one."""
    source, later = case.made().obj, _run(case, inputs, epoch=1)
    seen = [_run(case, inputs, source=source, epoch=e) for e in (0, 1, 0)]
    assert seen == [whole, later, whole], f"{case}: what it gives depends on what was read before"
    left = source.stream(inputs, epoch=0, rng=np.random.default_rng([0, 0]), progress=lambda: 0.0)
    next(left, None)
    assert _run(case, inputs, source=source) == whole, f"{case}: a stream depends on another one that was left"


def _nothing_invented(case: Case, inputs: Inputs, whole: list[Any]) -> None:
    known = {e.id for rows in inputs.values() for e in rows}
    for e in whole:
        assert e.id.split("#")[0] in known, f"{case} gave {e.id!r}, which is not from its inputs"


# --- rounds --------------------------------------------------------------------------------------------------


def _check_rounds(case: Case, takes: tuple[type, ...]) -> list[str]:
    assert takes, f"{case}: say in `takes` which types of examples it reads"
    for kind in takes:
        inputs = _inputs(case, kind)
        with _unchanged(case, inputs):
            whole, policy = _first_rounds(case, inputs)
            _follows_the_seed(
                case, whole, "its rounds depend on more",
                lambda seed, rng, p=policy, i=inputs: _rounds(case, i, p, seed=seed, first=rng),
            )  # fmt: skip
            assert _rounds(case, inputs, policy, resumed=True) == whole, f"{case}: a resumed run makes other rounds"
        _rows_kept(case, inputs, whole)
    return [
        "options", *(f"reads {k.__name__.lower()}" for k in takes), "deterministic", "another seed", "resumable",
        "rows kept", "written and read back", "inputs and model unchanged",
    ]  # fmt: skip


def _first_rounds(case: Case, inputs: Inputs) -> tuple[list[list[Any] | None], Policy]:
    """What the source makes, and of which model: one that answers, or a reward model if it refuses that one."""
    problem: Any = None
    for policy in (_policy.writer(), _policy.judge()):
        try:
            whole = _rounds(case, inputs, policy)
        except UsageError as e:
            problem = problem or e
            continue
        assert any(whole), f"{case} says that it takes {type(_first(inputs)).__name__}, and makes nothing of it"
        return whole, policy
    raise AssertionError(f"{case} says that it takes {type(_first(inputs)).__name__}: {problem}")


def _rounds(
    case: Case, inputs: Inputs, policy: Policy, *, seed: int = 0, first: np.random.Generator | None = None, resumed: bool = False
) -> list[list[Any] | None]:
    """The first two rounds, kept in a folder of their own; ``resumed``: the second one by a new object, as after a restart."""
    source, made = case.made().obj, []
    model: Any = policy.bundle.model
    before, mode = weights(model), [m.training for m in model.modules()]
    with tempfile.TemporaryDirectory() as folder:
        policy = replace(policy, folder=Path(folder))
        for n in range(2):
            rng = first if first is not None and n == 0 else np.random.default_rng([seed, n])
            source = case.made().obj if resumed else source
            given = source.round(inputs, policy=policy, round=n, rng=rng)
            made.append(None if given is None else _kept(case, policy.folder, n, given))
    assert same(before, weights(model)), f"{case} changes the weights"
    assert [m.training for m in model.modules()] == mode, f"{case} leaves the model in another mode"
    return made


def _kept(case: Case, folder: Path, n: int, given: Sequence[Any]) -> list[Any]:
    """The examples of a round as they are read from its file; those that the core leaves out are left out."""
    found = []
    for e in given:
        assert type(e) in rounds.FORMATS, f"{case} made a {type(e).__name__}, which cannot be written down"
        try:
            found.append(_read_back(case, e))
        except BadRow:
            continue
    path = rounds.place(folder, n)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(rounds.to_row(e)) + "\n" for e in found), encoding="utf-8")
    return found


def _rows_kept(case: Case, inputs: Inputs, whole: list[list[Any] | None]) -> None:
    known = {e.meta["row"] for rows in inputs.values() for e in rows}
    for e in (e for made in whole for e in made or ()):
        assert e.meta.get("row") in known, f"{case} made {e}, which does not say what its row said (meta)"
