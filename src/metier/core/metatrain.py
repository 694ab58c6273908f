"""Meta-training: a file that an optimizer reads is learned from the final losses of whole runs.

A rule takes part by two members: ``learns``, the name of its option that takes a safetensors file, and
``blank(names, seed) -> (tensors, header)``, a new file for parameters of these names. The tensors of the file, laid end to
end, are the vector that :mod:`metier.core.evolution` moves; the loss of a candidate is the ``eval_loss`` of one run with it.
Both candidates of a pair are run with the same seed, hence the same new weights and the same data in the same order; every
pair of every iteration has another seed.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metier.core import config, resolve
from metier.core.config import Run
from metier.core.context import derive_seed
from metier.core.errors import UsageError
from metier.core.evolution import Evolution, Settings
from metier.core.guards import NonFiniteError
from metier.core.tensorfile import check_header

Evaluate = Callable[[Path, int], float]
"""Loss of the candidate in a file, with the seed of its pair."""
Tell = Callable[[dict[str, float]], None]
STATE = "search"


@dataclass(frozen=True)
class Learned:
    """What a search has found."""

    file: Path
    iterations: int
    runs: int
    """Inner runs of all iterations."""
    history: list[dict[str, float]]
    """Per iteration: mean, lowest and highest loss of its candidates, how many were not finite, norm of the gradient."""


@dataclass(frozen=True)
class Flat:
    """Named float tensors as one vector, in the order of their names."""

    shapes: dict[str, tuple[int, ...]]
    header: dict[str, str]

    def vector(self, tensors: Mapping[str, Tensor]) -> np.ndarray:
        """The vector, in float64."""
        return np.concatenate([tensors[k].double().numpy().ravel() for k in self.shapes])

    def write(self, path: Path, vector: np.ndarray) -> None:
        """The vector as a file of float32 tensors."""
        sizes = [int(np.prod(s)) for s in self.shapes.values()]
        pieces = np.split(vector, np.cumsum(sizes)[:-1])
        tensors = {
            k: torch.tensor(x, dtype=torch.float32).reshape(s) for (k, s), x in zip(self.shapes.items(), pieces, strict=True)
        }
        save(path, tensors, self.header)


def flat_of(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Flat:
    """The shapes and header of a file's tensors."""
    return Flat({k: tuple(tensors[k].shape) for k in sorted(tensors)}, dict(header))


def save(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file; ``path`` is the old or the whole new one at every moment."""
    from safetensors.torch import save as as_bytes

    aside = path.with_name(f".{path.name}.new")
    aside.write_bytes(as_bytes(tensors, header))
    aside.replace(path)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file. Raises ``UsageError`` when it is missing or damaged."""
    from safetensors import safe_open

    try:
        check_header(path)
    except (OSError, ValueError) as e:
        raise UsageError(f"{path} cannot be read: {e}") from e
    with safe_open(path, framework="pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def metatrain(
    run: str | Path | Mapping[str, Any] | Run, overrides: Iterable[str] = (), *,
    out: str | Path, iterations: int, settings: Settings, tell: Tell | None = None,
) -> Learned:  # fmt: skip
    """Learn the file of a run's optimizer and write it to ``out``.

    Starts from the file that the run names, else from a blank one. After every iteration the file is the mean of the
    search so far, and ``<out>.search.safetensors`` beside it holds what is needed to go on: the same call continues.

    Raises ``UsageError`` when the optimizer learns nothing, the run has no held-out data, or ``out`` is not of this search.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("meta-training runs in one process", hint="Start it without a launcher.")
    spec, document = config.load(run, overrides)
    bound = resolve.bind("optimizer", spec.optimizer, config.place(document, "optimizer"))
    rule: Any = bound.built.obj
    if not hasattr(rule, "learns"):
        raise UsageError(f"{bound.built.id} has no file to learn", where=document.where(("optimizer",)))
    with tempfile.TemporaryDirectory() as aside:
        names = _parameters(spec, Path(aside) / "look")
        given = bound.built.options.get(rule.learns)
        tensors, header = rule.blank(names, settings.seed) if given is None else read(Path(given))
        inner = _Inner(spec, rule.learns, Path(aside))
        identity = {"run": spec.model_dump(mode="json"), "start": _digest(tensors)}
        return search(
            tensors, header, inner, out=Path(out), iterations=iterations, settings=settings, identity=identity, tell=tell
        )


def search(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], evaluate: Evaluate, *,
    out: Path, iterations: int, settings: Settings, identity: Mapping[str, Any] | None = None, tell: Tell | None = None,
) -> Learned:  # fmt: skip
    """Minimise ``evaluate`` from ``tensors`` for so many iterations in total; see :func:`metatrain`.

    ``identity``: what else must be equal for a saved search to be continued.
    """
    shape = flat_of(tensors, header)
    evolution = Evolution(shape.vector(tensors), settings)
    known = hashlib.sha256(json.dumps([asdict(settings), identity, header], sort_keys=True).encode()).hexdigest()
    beside = out.with_name(f"{out.stem}.{STATE}.safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)
    history = _resume(evolution, beside, out, known)
    shape.write(out, evolution.mean)
    while evolution.iteration < iterations:
        values = _values(evolution, shape, evaluate)
        finite = values[np.isfinite(values)]
        gradient = evolution.tell(values)
        seen = {
            "iteration": evolution.iteration, "mean": _or_nan(finite, np.mean), "lowest": _or_nan(finite, np.min),
            "highest": _or_nan(finite, np.max), "not_finite": values.size - finite.size,
            "gradient": float(np.linalg.norm(gradient)),
        }  # fmt: skip
        history.append(seen)
        _keep(evolution, beside, known, history)
        shape.write(out, evolution.mean)
        if tell is not None:
            tell(seen)
    return Learned(out, evolution.iteration, 2 * settings.pairs * evolution.iteration, history)


@dataclass(frozen=True)
class _Inner:
    """One whole run with a candidate."""

    run: Run
    option: str
    folder: Path

    def __call__(self, file: Path, seed: int) -> float:
        from metier.core import part
        from metier.core.api import train

        name, given = part.split_ref(self.run.optimizer, "optimizer")
        changed = self.run.model_dump(exclude_unset=True)
        changed["optimizer"] = {name: {**given, self.option: str(file)}}
        changed["train"] = {**changed.get("train", {}), "seed": seed}
        try:
            done = train(changed, out=self.folder / "inner", quiet=True, resume=False, keep_weights=False, handle_signals=False)
        except NonFiniteError:
            return float("inf")
        return done.metrics["eval_loss"]


def _parameters(spec: Run, folder: Path) -> list[str]:
    """Names of a run's trainable parameters; refuses a run without held-out data."""
    from metier.core.session import open_session

    settings, document = config.load(spec)
    with open_session(settings, document, folder, quiet=True, handle_signals=False) as session:
        if not session.eval_layouts:
            raise UsageError("meta-training needs held-out data", hint="Say data.eval=FILE or data.eval_fraction=0.1.")
        return [name for name, _ in session.context.optimizer.named()]  # type: ignore[attr-defined]


def _values(evolution: Evolution, shape: Flat, evaluate: Evaluate) -> np.ndarray:
    """Losses ``[pairs, 2]`` of this iteration's candidates."""
    values = np.empty((evolution.settings.pairs, 2))
    with tempfile.TemporaryDirectory() as folder:
        for i, pair in enumerate(evolution.ask()):
            seed = derive_seed(evolution.settings.seed, "pair", evolution.iteration, i) % 2**31
            for side, vector in enumerate(pair):
                file = Path(folder) / f"{i}-{side}.safetensors"
                shape.write(file, vector)
                values[i, side] = evaluate(file, seed)
    return values


def _keep(evolution: Evolution, beside: Path, known: str, history: list[dict[str, float]]) -> None:
    state = evolution.state_dict()
    tensors = {k: torch.from_numpy(state[k]) for k in ("mean", "m", "v")}
    finite = [{k: None if v != v else v for k, v in seen.items()} for seen in history]
    facts = {"identity": known, "iteration": evolution.iteration, "history": finite}
    save(beside, tensors, {STATE: json.dumps(facts)})


def _resume(evolution: Evolution, beside: Path, out: Path, known: str) -> list[dict[str, float]]:
    """Continue the search kept beside ``out``; its history. Refuses files of anything else."""
    hint = f"Remove {out.name} and {beside.name}, or write to another file."
    if not beside.exists():
        if out.exists():
            raise UsageError(f"{out} exists and is not of a search that can be continued", hint=hint)
        return []
    tensors, header = read(beside)
    facts = json.loads(header.get(STATE, "{}"))
    if facts.get("identity") != known:
        raise UsageError(f"{beside} holds another search: the run, the start or the settings differ", hint=hint)
    evolution.load_state_dict({**{k: t.numpy() for k, t in tensors.items()}, "iteration": facts["iteration"]})
    return [{k: float("nan") if v is None else v for k, v in seen.items()} for seen in facts["history"]]


def _or_nan(finite: np.ndarray, how: Callable[..., Any]) -> float:
    return float(how(finite)) if finite.size else float("nan")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    parts = b"".join(k.encode() + tensors[k].double().numpy().tobytes() for k in sorted(tensors))
    return hashlib.sha256(parts).hexdigest()
