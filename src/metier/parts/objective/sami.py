"""Self-supervised alignment with mutual information: each answer most likely under its own constitution."""

import math
from typing import Literal

import torch
from torch import Tensor

from metier.core.batch import Lists
from metier.core.data.examples import Crossed
from metier.core.errors import UsageError
from metier.core.part import part
from metier.core.preferences import mean

Side = Literal["symmetric", "row", "column"]


@part(
    "objective/sami",
    paper="arXiv:2404.14313",
    rows=(141,),
)
def sami(b: Lists, *, side: Side = "symmetric") -> tuple[Tensor, dict[str, Tensor]]:
    """InfoNCE between ``C`` constitutions and the ``C`` answers written under them, for one query per list. Returns ``[B]``.

    A list is the matrix ``S[i, j] = mean log π(y_j | x, c_i)`` per token, row by row: ``K = C²`` entries, with score 1 where
    the answer meets its own constitution (``i = j``), lower elsewhere. The row term ``-mean_i log softmax_j(S)[i, i]`` asks
    which answer belongs to a constitution, the column term which constitution led to an answer; ``side="symmetric"`` is half
    their sum. Lists may have different ``C``. No reference; the released code's optional divergence from the base model
    (weight 0 by default) is not part of this objective.

    Metrics: ``accuracy_row`` and ``accuracy_col``, how often the diagonal is the largest (ties share); ``bound = log C - loss``,
    a lower bound of the mutual information in nats.
    Raises ``UsageError`` when a list is not square or its diagonal is not where the scores say.
    """
    counts = b.present.sum(-1)
    names = ("loss", "accuracy_row", "accuracy_col")
    out = {name: b.logps.new_zeros(counts.shape) for name in names}
    scores = mean(b)
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero().squeeze(1)
        size, inside = _size(count), b.present[rows]
        _check_diagonal(b.score[rows][inside].view(-1, size, size))
        for name, value in zip(names, _terms(scores[rows][inside].view(-1, size, size), side), strict=True):
            out[name] = out[name].index_copy(0, rows, value)
    bound = 0.5 * counts.clamp(min=1).to(scores.dtype).log() - out["loss"].detach()
    return out["loss"], {"accuracy_row": out["accuracy_row"], "accuracy_col": out["accuracy_col"], "bound": bound}


sami.tags = ("data/feedback/list", "constraint/reference/free")  # type: ignore[attr-defined]
sami.traits = {
    "annotator": ("none", "constitutions take the place of labels"),
    "loop": ("iterative", "the paper repeats rounds of sampling and training"),
}  # type: ignore[attr-defined]


def _terms(s: Tensor, side: Side) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both accuracies of matrices ``[n, C, C]``, each ``[n]``."""
    across = {"row": 2, "column": 1}
    loss = {name: -_diagonal(s.log_softmax(dim)).mean(1) for name, dim in across.items()}
    chosen = (loss["row"] + loss["column"]) / 2 if side == "symmetric" else loss[side]
    return chosen, *(_accuracy(s.detach(), dim) for dim in across.values())  # type: ignore[return-value]


def _accuracy(s: Tensor, dim: int) -> Tensor:
    top = (s == s.amax(dim, keepdim=True)).to(s.dtype)
    return (_diagonal(top) / top.sum(dim)).mean(1)


def _diagonal(s: Tensor) -> Tensor:
    return s.diagonal(dim1=1, dim2=2)


def _size(count: int) -> int:
    size = math.isqrt(count)
    if size * size != count or not count:
        raise UsageError(
            f"a list of {count} answers is not a square of constitutions by answers",
            where="sami",
            hint="Each query needs C² scored entries: every one of C answers under every one of C constitutions.",
        )
    return size


def _check_diagonal(score: Tensor) -> None:
    own = torch.eye(score.shape[1], dtype=torch.bool, device=score.device)
    if not torch.equal(score == 1, own.expand_as(score)):
        raise UsageError(
            "scores of a list must be 1 where an answer meets its own constitution and lower elsewhere",
            where="sami",
            hint="Entries stand row by row: the answers under constitution 1, then those under constitution 2, ….",
        )


sami.takes = (Crossed,)  # type: ignore[attr-defined]
