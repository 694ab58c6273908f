"""Preference pairs as probes find them: in a file, or decoded from the rows that a run trains on."""

from typing import Any

import torch

from metier.core.batch import Pairs, Rewards
from metier.core.data.derive import derive
from metier.core.data.examples import Preference
from metier.core.data.formats import examples
from metier.core.data.rows import open_rows
from metier.core.errors import UsageError
from metier.core.judging import plain as said
from metier.core.layout import Layout
from metier.core.probing import Probe

__all__ = ["pairs", "said"]


def pairs(probe: Probe, data: str | None, limit: int | None) -> list[Preference]:
    """Pairs of ``data`` (a file, a folder, ``lab/…``), else those of the probed layouts, decoded.

    Raises ``UsageError`` when there are none.
    """
    if data is not None:
        found: list[Any] = examples(open_rows(data, limit=limit))
        made = (found, "") if isinstance(found[0], Preference) else derive(found, (Preference,))
        if made is None or not made[0]:
            raise UsageError(f"{data} holds {type(found[0]).__name__.lower()} examples, no preference pairs", where="data")
        return made[0]
    if probe.reads not in (Pairs, Rewards):
        raise UsageError("the run's objective reads no preference pairs", hint="Give data: a file with preference pairs.")
    return [e for layout in probe.layouts for e in _decoded(probe, layout)][:limit]


def _decoded(probe: Probe, layout: Layout) -> list[Preference]:
    def text(ids: torch.Tensor) -> str:
        return probe.bundle.tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    made, first = [], 0
    for id, answers in zip(layout.ids, layout.answers, strict=True):
        here = [(layout.sequence == s).nonzero().squeeze(1) for s in (first, first + 1)]
        first += answers
        row, last = int(layout.row[here[0][0]]), int(layout.col[here[0][0]])
        asked = (layout.group[row] == layout.group[row, last]) & (layout.branch[row] == 0)
        asked[last + 1 :] = False
        chosen, rejected = (text(layout.target[i]) for i in here)
        made.append(Preference(text(layout.input_ids[row][asked]), chosen, rejected, id=id))
    return made
