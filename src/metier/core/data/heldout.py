"""Which examples are held out for evaluation: the same for every run on the same rows."""

from dataclasses import replace
from typing import Any

import numpy as np

from metier.core.context import derive_seed
from metier.core.data import formats
from metier.core.data.rows import Rows
from metier.core.errors import UsageError


def divide(rows: Rows, found: list[Any], fraction: float, *, tails: bool) -> tuple[list[Any], list[Any]]:
    """Examples to train on and a held-out fraction, chosen by a fixed seed: the same for every run on these rows.

    All examples of a row stay together. With ``tails`` and too few rows for the fraction, the end of each text is held out.
    """
    if tails and len(rows) * fraction < 1:
        return _tails(found, fraction)
    number = max(1, round(len(rows) * fraction))
    order = np.random.default_rng(derive_seed("held out", len(rows))).permutation(len(rows))
    ids = {rows.id(i) for i in order[:number].tolist()}
    held = [e for e in found if e.id in ids or e.id.rpartition("+")[0] in ids]
    kept = [e for e in found if not (e.id in ids or e.id.rpartition("+")[0] in ids)]
    if not held or not kept:
        raise UsageError(
            f"{rows.name} has only {len(rows)} rows: {'none is left to train on' if held else 'none can be held out'}",
            where="data.eval_fraction", hint="Give data.eval, or more rows." ,
        )  # fmt: skip
    return kept, held


def _tails(found: list[formats.Text], fraction: float) -> tuple[list[Any], list[Any]]:
    """Each text up to a line end, and the rest of it; a text of one line is kept whole."""
    kept, held = [], []
    for e in found:
        aim = int(len(e.text) * (1 - fraction))
        at = e.text.rfind("\n", 0, aim) + 1 or e.text.find("\n", aim) + 1
        head, tail = e.text[:at], e.text[at:]
        if head.strip() and tail.strip():
            held.append(replace(e, text=tail, id=f"{e.id} tail"))
        kept.append(replace(e, text=head) if head.strip() and tail.strip() else e)
    if not held:
        raise UsageError(
            "the texts have no lines at which an end can be held out",
            where="data.eval_fraction",
            hint="Give data.eval.",
        )
    return kept, held
