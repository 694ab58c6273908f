"""Semi-supervised reward modelling: a reward model labels more pairs for itself (He et al., 2024, arXiv:2409.06903)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Le

from metier.core.data.derive import derive
from metier.core.data.examples import Preference, Ranked
from metier.core.errors import UsageError
from metier.core.part import Count, Positive, part
from metier.core.policy import Policy
from metier.core.runfolder import write_json
from metier.parts.source._pseudo import pseudo_labelled, report, selected

NAMES = ("labelled", "unlabelled")


@part("source/ssrm", paper="arXiv:2409.06903, algorithm 1", rows=(100,), needs=("policy",))
class Ssrm:
    """Iterative self-training of a reward model: few labelled pairs, many unlabelled ones.

    The first round gives the labelled pairs. Every later one lets the reward model, as it then is, label the whole pool anew,
    ``p = σ((r₁ - r₂)/temperature)``; pairs with ``max(p, 1-p) > threshold`` join the labelled ones, with the answer that the
    model prefers as the chosen one. Training goes on from the weights at hand, as in the paper, under one schedule.

    Data: two named inputs, ``data.train: {labelled: …, unlabelled: …}``, with ``objective: bradley-terry``. Unlabelled pairs
    are preference rows whose order is not believed, or lists of two whose scores are not looked at. The released script filters
    by confidence but keeps the order of the row: with a pool that is truly without labels, half of what it is sure of would
    be upside down; here the answers are exchanged. Margins are dropped, since pseudo-labels have none.

    ``selection: random`` picks as many pairs by lot, the control for what the threshold does; threshold 0.5 keeps all.
    ``size``: examples of a round, drawn by going through the union again and again, each time in another order (default: once
    through); ``copies``: how often labelled pairs stand in it, against confirmation bias. A model that is sure of
    everything filters nothing: raise ``temperature`` until held-out confidence and accuracy agree. Stop when held-out accuracy
    or the selected share no longer grow. ``rounds/report-0002.json`` and so on tell the selected share and, where rows have
    ``gold_chosen`` and ``gold_rejected``, accuracy and calibration of the labels. The judge that reads both answers at once is
    in ``_pairwise.py``; a scalar reward needs no averaging over orders, ``p(a, b) + p(b, a) = 1`` holds as it stands.

    Raises ``UsageError`` for other inputs, for lists that are not pairs, and when no reward model is trained.
    """

    takes = (Preference, Ranked)

    def __init__(
        self, *, threshold: Annotated[float, Ge(0.5), Le(1)] = 0.8, temperature: Positive = 1.0,
        selection: Literal["confident", "random"] = "confident", size: Count | None = None, copies: Count = 1,
    ) -> None:  # fmt: skip
        self.threshold, self.temperature, self.selection = threshold, temperature, selection
        self.size, self.copies = size, copies

    def round(
        self, inputs: Mapping[str, Sequence[Any]], *, policy: Policy, round: int, rng: np.random.Generator
    ) -> list[Preference]:
        """The pairs of one round, in random order."""
        if set(inputs) != set(NAMES):
            raise UsageError(
                f"source/ssrm reads inputs called {' and '.join(NAMES)}, not {', '.join(sorted(inputs))}", where="data.train",
                hint="Write train: {labelled: FILE, unlabelled: FILE}.",
            )  # fmt: skip
        union = [replace(e, margin=None) for e in _labelled(inputs["labelled"])] * self.copies
        if round > 0:
            pool = [e for e in map(_pair, inputs["unlabelled"]) if _usable(e, policy)]
            p = self.probabilities(pool, policy)
            picked = selected(p, self.threshold)
            if self.selection == "random":
                picked = rng.permutation(picked) & (p != 0.5)
            union += pseudo_labelled(pool, p, picked)
            found = {"round": round + 1, "labelled": len(inputs["labelled"]), **report(pool, p, picked)}
            write_json(policy.folder / "rounds" / f"report-{round + 1:04d}.json", found)
        size = self.size or len(union)
        order = [i for _ in range(-(-size // len(union))) for i in rng.permutation(len(union))]
        return [union[i] for i in order[:size]]

    def probabilities(self, pool: Sequence[Preference], policy: Policy) -> np.ndarray:
        """``[N]`` probability under the reward model that the answer standing first is the better one."""
        found = policy.rewards([e.prompt for e in pool], [(e.chosen, e.rejected) for e in pool])
        gap = np.array([r[0] - r[1] for r in found]) / self.temperature
        return (1 + np.tanh(gap / 2)) / 2  # the logistic function, without overflow


def _labelled(found: Sequence[Any]) -> Sequence[Preference]:
    if isinstance(found[0], Preference):
        return found
    derived = derive(found, (Preference,))
    if derived is None or not derived[0]:
        raise UsageError("source/ssrm: no labelled list has two different scores", where="data.train")
    return derived[0]


def _pair(e: Preference | Ranked) -> Preference:
    if isinstance(e, Preference):
        return e
    if len(e.completions) != 2:
        raise UsageError(f"source/ssrm: {len(e.completions)} answers, expected two", where=e.id)
    return Preference(e.prompt, *e.completions, id=e.id, meta=e.meta)


def _usable(e: Preference, policy: Policy) -> bool:
    """Whether the pair fits ``data.max_length`` and its answers differ in their tokens."""
    item = policy.encoder(Ranked(e.prompt, (e.chosen, e.rejected), (0.0, 0.0), id=e.id))
    return item is not None and not np.array_equal(item.answers[0], item.answers[1])
