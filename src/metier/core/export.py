"""Export of a run's result, proven before it is published.

The folder is written aside, loaded again from disk, and must answer as the trained model does:
log-probabilities at every position of the prompts and of the trained model's greedy continuation of them.
Otherwise nothing is left behind.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metier.core import models, trained
from metier.core.errors import MetierError, UsageError
from metier.core.runfolder import publish, write_json

PROMPTS = (
    "The",
    "Once upon a time there was a",
    "Question: what is 12 + 30?\nAnswer:",
    "def add(a, b):\n    return",
    "In 1905, he wrote that the speed of light is",
)
CONTINUE = 12
"""Greedy tokens appended to every prompt."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}
"""Largest difference of a log-probability in nats. Merging rounds every weight once to its own type."""
FLOOR = math.log(1e-6)
"""Tokens that both models find less likely than this are not compared: their log-probabilities are mostly
rounding."""


@dataclass(frozen=True)
class Difference:
    """How far the exported model's answers are from the trained one's."""

    logp: float
    """Largest absolute difference of a log-probability, in nats."""
    tolerance: float
    greedy: float
    """Share of positions whose most likely token is the same."""
    flips: int
    """Positions where it is another one although the trained model's choice was clear."""
    positions: int

    @property
    def ok(self) -> bool:
        """Whether the answers agree."""
        return self.logp <= self.tolerance and self.flips == 0


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    folder: Path
    merged: bool
    difference: Difference


def export(
    run_folder: str | Path, out: str | Path, *, merged: bool = True, prompts: Sequence[str] | None = None
) -> Exported:
    """Write the run's model (``merged``: plain weights; otherwise the adapter alone) to ``out``, which must
    not exist.

    Raises ``UsageError`` for a wrong request or an adapter that cannot be merged, ``MetierError`` when the
    folder read back from disk answers differently; in both cases ``out`` is not there.
    """
    target = vacant(out)
    source = trained.open_run(run_folder)
    if not merged and source.attached is None:
        raise UsageError(f"the run {source.folder} trained the whole model: it has no adapter to export")
    texts = [tokens(source.bundle.tokenizer, p) for p in (PROMPTS if prompts is None else prompts)]
    probes = [p for p in texts if p.shape[1] > 0]
    if not probes:
        raise UsageError("export needs at least one prompt that is not empty")
    probes = [continued(source.bundle.model, p) for p in probes]
    expected = [log_probs(source.bundle.model, p) for p in probes]
    found: list[Difference] = []
    publish(target, lambda aside: found.append(_write_and_prove(source, aside, merged, probes, expected)))
    return Exported(target, merged, found[0])


def vacant(out: str | Path) -> Path:
    """``out``, which must be absent or an empty folder: nothing of the user's is overwritten."""
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists already", hint="Choose another folder, or remove it first.")
    return target


def _write_and_prove(
    source: trained.Trained, aside: Path, merged: bool, probes: Sequence[Tensor], expected: Sequence[Tensor]
) -> Difference:
    dtype = trained.dtype_of(source.run)
    reloaded = _write_merged(source, aside) if merged else _write_adapter(source, aside)
    difference = compare(expected, [log_probs(reloaded, p) for p in probes], TOLERANCE[dtype])
    if not difference.ok:
        raise MetierError(
            f"the exported model does not answer as the trained one: log-probabilities differ by up to "
            f"{difference.logp:.3g} nats (allowed: {difference.tolerance:g}), {difference.flips} of "
            f"{difference.positions} clear choices changed. Nothing was written."
        )
    card = {
        "run": str(source.folder),
        "base": source.run.model,
        "merged": merged,
        "dtype": str(dtype).removeprefix("torch."),
        "proof": asdict(difference),
    }
    write_json(aside / "export_card.json", card)
    return difference


def _write_merged(source: trained.Trained, aside: Path) -> Any:
    bundle, run = source.bundle, source.run
    if source.attached is not None:
        bundle = models.replace_model(bundle, source.attached.merge())
    models.save(bundle, aside)
    return trained.load_folder(aside, run).model.eval()


def _write_adapter(source: trained.Trained, aside: Path) -> Any:
    assert source.attached is not None
    source.attached.save(aside)
    return trained.load_with_adapter(source.run, aside)[0].model.eval()


def tokens(tokenizer: Any, prompt: str) -> Tensor:
    """Token ids ``[1, T]`` of plain text."""
    return torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.long)


@torch.inference_mode()
def continued(model: Any, ids: Tensor) -> Tensor:
    """``ids [1, T]`` with the model's greedy continuation; unchanged for models that do not generate."""
    limit = getattr(model.config, "max_position_embeddings", None) or ids.shape[1] + CONTINUE
    if not model.can_generate():
        return ids[:, :limit]
    ids = ids[:, :limit]
    for _ in range(min(CONTINUE, limit - ids.shape[1])):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


@torch.inference_mode()
def log_probs(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities of every position ``[T, V]``, or of the labels ``[1, L]`` for a classifier."""
    return torch.log_softmax(model(ids).logits.double(), -1).flatten(0, -2)


def compare(expected: Sequence[Tensor], got: Sequence[Tensor], tolerance: float) -> Difference:
    """Compare log-probabilities ``[T, V]`` position by position. A non-finite value differs by infinity."""
    worst, same, flips, positions = 0.0, 0, 0, 0
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape:
            raise MetierError(
                f"the exported model's output is {list(b.shape)}, the trained one's {list(a.shape)}"
            )
        gap = torch.where((a > FLOOR) | (b > FLOOR), (a - b).abs(), 0.0)
        worst = max(worst, math.inf if bool(b.isnan().any()) else float(gap.max()))
        agree = a.argmax(-1) == b.argmax(-1)
        top = a.topk(min(2, a.shape[-1]), -1).values
        clear = top[:, 0] - top[:, -1] > 2 * tolerance
        same, flips, positions = (
            same + int(agree.sum()),
            flips + int((clear & ~agree).sum()),
            positions + len(a),
        )
    return Difference(worst, tolerance, same / max(positions, 1), flips, positions)
