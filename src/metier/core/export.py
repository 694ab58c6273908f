"""Export of a run's result, proven before it is published.

The folder is written aside, loaded again from disk, and must answer as the trained model does:
log-probabilities at every position of the prompts and of the trained model's greedy continuation of them.
Otherwise nothing is left behind.

The comparison is computed in float32 whatever the weights' type, because two half-precision passes of one
model already differ by more than a wrong merge may. With half-precision weights a merge rounds every weight
once; what that changes is measured apart from the merge itself.
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
TOLERANCE = 1e-3
"""Largest difference of a log-probability, in nats: between the trained and the merged model in float32, and
between what was written and what is read back."""
ROUNDING = 1e-2
"""Largest mean Kullback-Leibler divergence, in nats, that rounding merged weights to their own type may
cause."""
FLOOR = math.log(1e-6)
"""Tokens that both models find less likely than this are not compared: their log-probabilities are mostly
rounding."""


@dataclass(frozen=True)
class Difference:
    """How far one model's answers are from another's, over all positions."""

    logp: float
    """Largest absolute difference of a log-probability, in nats."""
    kl: float
    """Mean Kullback-Leibler divergence from the expected distribution, in nats."""
    greedy: float
    """Share of positions whose most likely token is the same."""
    positions: int


@dataclass(frozen=True)
class Proof:
    """The three comparisons of an export."""

    merge: Difference
    """Trained model against the model to be written, before rounding."""
    disk: Difference
    """What was written against what is read back."""
    total: Difference
    """Trained model against what is read back: this includes the rounding of half-precision weights."""

    @property
    def ok(self) -> bool:
        """Whether all three are within their limits."""
        return max(self.merge.logp, self.disk.logp) <= TOLERANCE and self.total.kl <= ROUNDING


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    folder: Path
    merged: bool
    proof: Proof


def export(run_folder: str | Path, out: str | Path, *, merged: bool = True, prompts: Sequence[str] | None = None) -> Exported:
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
    source.bundle.model.float()
    probes = [continued(source.bundle.model, p) for p in probes]
    proofs: list[Proof] = []
    publish(target, lambda aside: proofs.append(_write_and_prove(source, aside, merged, probes)))
    return Exported(target, merged, proofs[0])


def vacant(out: str | Path) -> Path:
    """``out``, which must be absent or an empty folder: nothing of the user's is overwritten."""
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists already", hint="Choose another folder, or remove it first.")
    return target


def _write_and_prove(source: trained.Trained, aside: Path, merged: bool, probes: Sequence[Tensor]) -> Proof:
    expected = _answers(source.bundle.model, probes)
    before, written = (_write_merged if merged else _write_adapter)(source, aside, probes)
    read = _read_merged(source, aside) if merged else trained.load_with_adapter(source.run, aside)[0].model
    got = _answers(read.float().eval(), probes)
    proof = Proof(compare(expected, before), compare(written, got), compare(expected, got))
    if not proof.ok:
        raise MetierError(
            "the exported model does not answer as the trained one, and nothing was written: log-probabilities "
            f"differ by up to {proof.merge.logp:.3g} nats through the merge and {proof.disk.logp:.3g} through "
            f"saving (allowed: {TOLERANCE:g}), KL divergence in all {proof.total.kl:.3g} (allowed: {ROUNDING:g})"
        )
    card = {
        "run": str(source.folder),
        "base": source.run.model,
        "merged": merged,
        "dtype": source.run.dtype,
        "proof": asdict(proof),
    }
    write_json(aside / "export_card.json", card)
    return proof


Answers = list[Tensor]


def _write_merged(source: trained.Trained, aside: Path, probes: Sequence[Tensor]) -> tuple[Answers, Answers]:
    """Write the merged model; returns its answers before and after rounding to the run's type."""
    bundle = source.bundle
    if source.attached is not None:
        bundle = models.replace_model(bundle, source.attached.merge())
    before = _answers(bundle.model, probes)
    for p in bundle.model.parameters():
        # buffers stay: rotary frequencies, for one, are wide whatever the weights' type
        p.data = p.data.to(trained.dtype_of(source.run))
    models.save(bundle, aside)
    return before, _answers(bundle.model.float(), probes)


def _write_adapter(source: trained.Trained, aside: Path, probes: Sequence[Tensor]) -> tuple[Answers, Answers]:
    assert source.attached is not None
    source.attached.save(aside)
    answers = _answers(source.bundle.model, probes)
    return answers, answers


def _read_merged(source: trained.Trained, aside: Path) -> Any:
    return trained.load_folder(aside, source.run).model


def _answers(model: Any, probes: Sequence[Tensor]) -> Answers:
    return [log_probs(model, p) for p in probes]


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


def compare(expected: Sequence[Tensor], got: Sequence[Tensor]) -> Difference:
    """Compare log-probabilities ``[T, V]`` position by position. A value that is not a number differs by
    infinity."""
    worst, kl, same, positions = 0.0, 0.0, 0, 0
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape:
            raise MetierError(f"the exported model's output is {list(b.shape)}, the trained one's {list(a.shape)}")
        gap = torch.where((a > FLOOR) | (b > FLOOR), (a - b).abs(), 0.0)
        worst = max(worst, math.inf if bool(b.isnan().any()) else float(gap.max()))
        kl += float(torch.where(a > FLOOR, a.exp() * (a - b), 0.0).sum())
        same, positions = same + int((a.argmax(-1) == b.argmax(-1)).sum()), positions + len(a)
    return Difference(worst, kl / max(positions, 1), same / max(positions, 1), positions)
