"""Preference pairs as probes see them: their tokens and features of their answers."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from metier.core.data import formats
from metier.core.data.budget import token_budget
from metier.core.data.derive import derive
from metier.core.data.encode import Encoder
from metier.core.data.loader import Shape
from metier.core.data.rows import open_rows
from metier.core.errors import UsageError
from metier.core.forward import hidden_states
from metier.core.layout import Layout
from metier.core.probing import Probe
from metier.core.separate import why_apart

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and of its chosen and rejected answer, with the end tokens."""

    prompt: Ids
    chosen: Ids
    rejected: Ids


def encoded(probe: Probe, where: str, *, max_length: int, limit: int | None = None) -> list[Layout]:
    """Layouts of the pairs in a data set, as a run would read them. Longer ones are left out.

    Raises ``UsageError`` for data of another kind.
    """
    found = formats.examples(open_rows(where, limit=limit))
    if not isinstance(found[0], formats.Preference):
        derived = derive(found, (formats.Preference,))
        if derived is None or not derived[0]:
            raise UsageError(
                f"{where} holds {type(found[0]).__name__.lower()} examples, not pairs", hint="See: metier data check"
            )
        found = derived[0]
    encoder = Encoder(probe.bundle.tokenizer, max_length=max_length, truncate="drop", on_empty="drop")
    items = encoder.all(found)
    budget = token_budget(probe.model.config, probe.engine.device.type)
    shape = Shape(probe.bundle.tokenizer.pad_token_id or 0, budget, unit="example", separate=bool(why_apart(probe.model)))
    return shape.layouts(items, shape.micros(items))


def paired(layouts: Sequence[Layout]) -> list[Layout]:
    """Those layouts whose examples have two answers or more; of these the first two are the pair."""
    return [x for x in layouts if x.answers and min(x.answers) >= 2 and x.end is not None]


def pairs(layouts: Sequence[Layout]) -> list[Pair]:
    """The pairs of all layouts, in order."""
    return [pair for layout in layouts for pair in _pairs(layout)]


def _pairs(layout: Layout) -> Iterator[Pair]:
    order = layout.sequence.cpu().numpy()
    targets = layout.target.cpu().numpy()
    for s in _starts(layout):
        first = int(np.flatnonzero(order == s)[0])
        row, col = int(layout.row[first]), int(layout.col[first])
        same = (layout.group[row] == layout.group[row, col]) & (layout.branch[row] == 0)
        same[col + 1 :] = False
        answers = (tuple(targets[order == k].tolist()) for k in (s, s + 1))
        yield Pair(tuple(layout.input_ids[row][same].tolist()), *answers)


def _starts(layout: Layout) -> np.ndarray:
    """Index of the first answer of each example."""
    answers = np.array(layout.answers, int)
    return np.cumsum(answers) - answers


# --- features ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def hidden_differences(probe: Probe, layouts: Sequence[Layout]) -> np.ndarray:
    """``[N, D]``: mean hidden state over the tokens of the chosen answer less that of the rejected one, of the probed model."""
    found = []
    for layout in layouts:
        there = layout.to(probe.engine.device)
        with probe.engine.autocast():
            h = hidden_states(probe.model, there).float()
        sums = h.cumsum(1)
        length = torch.bincount(there.sequence, minlength=sum(layout.answers))
        assert there.end is not None
        row, last = there.end.unbind(1)
        before = (last - length).clamp(min=0)
        total = sums[row, last] - sums[row, before] * (last >= length).unsqueeze(1)
        mean = (total / length.clamp(min=1).unsqueeze(1)).double().cpu().numpy()
        starts = _starts(layout)
        found.append(mean[starts] - mean[starts + 1])
    return np.concatenate(found)


def gram_differences(found: Sequence[Pair], width: int = 2048) -> np.ndarray:
    """``[N, width]``: how often each token and each pair of neighbours stands in the chosen answer more than in the rejected
    one, hashed into ``width`` columns."""
    out = np.zeros((len(found), width))
    for row, pair in zip(out, found, strict=True):
        for answer, sign in ((pair.chosen, 1), (pair.rejected, -1)):
            for gram, number in grams(answer).items():
                row[hash(gram) % width] += sign * number  # of ints, so the same in every process
    return out


def grams(ids: Ids) -> Counter[Ids]:
    """Counts of tokens and of neighbouring pairs."""
    return Counter([*((i,) for i in ids), *pairwise(ids)])
