"""Every answer in a row of its own: the layout for models that cannot keep apart several sequences in a row.

The order of targets, answers and examples stays, so scores, sums and losses are those of the layout that was separated.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metier.core import forward, models
from metier.core.layout import Layout
from metier.core.scores import FrozenScorer, evaluating, target_states


def separate(layout: Layout, pad_id: int) -> Layout:
    """Row ``s`` holds the prompt of answer ``s`` and the answer, right-padded, as a plain sequence (group 1, branch 0).

    Plain sequences that share a row are separated too. A layout that is plain comes back as it is.
    """
    if layout.plain:
        return layout
    row, member = _members(layout)
    place = member.cumsum(1) - 1
    lengths = member.sum(1)
    here, column = member.nonzero(as_tuple=True)
    to = (here, place[here, column])
    shape = (len(row), int(lengths.max()))

    def spread(values: Tensor, absent: int = 0) -> Tensor:
        out = values.new_full(shape, absent)
        out[to] = values[row[here], column]
        return out

    inside = torch.arange(shape[1], device=row.device) < lengths.unsqueeze(1)
    return replace(
        layout, input_ids=spread(layout.input_ids, pad_id), position_ids=spread(layout.position_ids), group=inside.long(),
        branch=torch.zeros_like(inside, dtype=torch.int64), row=layout.sequence, col=place[layout.sequence, layout.col],
        end=torch.stack([torch.arange(len(row), device=row.device), lengths - 1], 1),
        extra={name: spread(values) for name, values in layout.extra.items()},
        copies=layout.copies + int(lengths.sum() - (layout.group > 0).sum()),
    )  # fmt: skip


def _members(layout: Layout) -> tuple[Tensor, Tensor]:
    """For every answer: its row ``[S]``, and which tokens of that row ``[S, T]`` are its prompt or its own."""
    assert layout.end is not None
    row, last = layout.end.unbind(1)
    group = layout.group[row, last]
    number = torch.cat([torch.arange(1, n + 1) for n in layout.answers]).to(row.device)
    branch = layout.branch[row]
    return row, (layout.group[row] == group.unsqueeze(1)) & ((branch == 0) | (branch == number.unsqueeze(1)))


def scorer(model: nn.Module, score: FrozenScorer, pad_id: int) -> FrozenScorer:
    """``score`` for a reference model that may be unable to take the groups which the trained model takes."""
    if why_apart(model) is None:
        return score
    return replace(score, prepared=lambda layout: separate(layout, pad_id))


# --- does a model need it? ---------------------------------------------------------------------------------------


def why_apart(model: Any) -> str | None:
    """Why sequences may not share a row of this model, in words; ``None`` when they may. Asks the model, then tries it."""
    if why := forward.takes_groups(model):
        return why
    layout = sample_layout(models.embeddings(model)).to(next(model.parameters()).device)
    alone = _states(model, separate(layout, 0))
    try:
        gap = _gap(model, layout, alone)
    except (TypeError, ValueError, RuntimeError, IndexError) as e:
        return f"it fails on a mask of its own for every row ({type(e).__name__}: {str(e).strip().splitlines()[0]})"
    return None if gap <= _tolerance(model) else "sequences in a row of it influence each other in spite of the mask"


def _tolerance(model: nn.Module) -> float:
    """Share of a missing mask's effect that may be rounding."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return 1e-4 if kinds <= {torch.float32, torch.float64} else 0.05


def _gap(model: Any, layout: Layout, alone: Tensor) -> float:
    """What answers change in each other's hidden states, relative to what they would change without any mask."""
    unmasked = replace(
        layout, group=torch.ones_like(layout.group), branch=torch.zeros_like(layout.branch),
        position_ids=torch.arange(layout.group.shape[1], device=layout.group.device).expand_as(layout.group),
    )  # fmt: skip
    together, mixed = _states(model, layout), _states(model, unmasked)
    error, effect = (float((x - alone).double().square().mean().sqrt()) for x in (together, mixed))
    return 0.0 if effect <= 1e-5 * float(alone.abs().max()) else error / effect


@torch.no_grad()
def _states(model: Any, layout: Layout) -> Tensor:
    with evaluating(model):
        return target_states(model, layout)


def sample_layout(embedding: Any) -> Layout:
    """A row of two groups: a prompt of 3 tokens with answers of 4, 1 and 5, and one of 2 tokens with answers of 2 and 3."""
    import numpy as np

    from metier.core.data.collate import collate
    from metier.core.data.encode import Item

    def ids(n: int, salt: int) -> Any:
        return ((np.arange(n) * 7919 + 104729 * salt + 11) % embedding.weight.shape[0]).astype(np.int32)

    def group(prompt: int, *answers: int) -> Item:
        own = tuple(ids(n, 10 * prompt + k) for k, n in enumerate(answers))
        return Item(ids(prompt, prompt), np.zeros(prompt, bool), own, tuple(np.ones(n, bool) for n in answers))

    return collate([group(3, 4, 1, 5), group(2, 2, 3)], pad_id=0, rows=[[0, 1]])
