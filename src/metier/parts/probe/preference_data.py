"""Three measurements of a preference set before compute is spent on it (Shen, Sharma, Qin, 2024, arXiv:2409.09603)."""

from typing import Any, Literal

import numpy as np
import torch

from metier.core.batch import Pairs, Rewards
from metier.core.errors import UsageError
from metier.core.layout import Layout
from metier.core.part import Count, part
from metier.core.preferences import means
from metier.core.probing import Probe
from metier.parts.probe import _pairs as read
from metier.parts.probe import _similarity as similar
from metier.parts.probe._curves import equivalent_size, flips, intrinsic_noise, invariance, saturation, subset
from metier.parts.probe._linear import Learner
from metier.parts.probe._measures import RATES, Noise, Scale, information, noise, scale

__all__ = [
    "Learner", "equivalent_size", "flips", "information", "intrinsic_noise", "invariance", "noise", "preference_data",
    "saturation", "scale", "subset",
]  # fmt: skip
LEAST = 50


@part("probe/preference-data", paper="arXiv:2409.09603", rows=(104,))
def preference_data(
    probe: Probe, *, data: str | None = None, benchmark: str | None = None, compared: str | None = None,
    features: Literal["hidden", "grams"] = "hidden",
    similarity: Literal["tfidf", "minilm", "overlap", "length", "margin"] = "tfidf", seeds: Count = 3, limit: Count | None = None,
    max_length: Count = 1024,
) -> dict[str, Any]:  # fmt: skip
    """What the pairs of ``data`` (default: those probed) give, by small reward models trained on parts of them.

    ``scale``: accuracy over 1/16 … 1 of them and ``n_95``, the size that gives 95 % of the gain over chance. ``noise``:
    accuracy and mean ``|r_w - r_l|`` with 0 … 0.5 of the training labels flipped, ``noise_area`` (mean share of the gain that is
    left up to 0.4) and ``q_half`` (rate that costs half of it). ``bins``: accuracy after training on the pairs of low, middle
    and high ``similarity`` of their answers: TF-IDF cosine, cosine of sentence embeddings, overlap of tokens and neighbours,
    ratio of lengths, or the probed model's own margin. Definitions are ours where the paper gives none.

    The reward model is linear on frozen features, a logistic regression fitted by L-BFGS: fast enough for a hundred fits, and
    blind to what the features do not show. ``hidden``: the probed model's last states averaged over each answer; ``grams``:
    counts of tokens and neighbours, for a look without a model. The decay is chosen on validation pairs whose labels are never
    flipped, in place of early stopping. For another learner call ``scale``, ``noise``, ``information`` with a function of your
    own.

    With ``benchmark``, another set, a third of it validates and the rest tests; else a tenth and a fifth of the data. Whole
    prompts go to one side. With ``compared``, another set: ``equivalent``, how many of its pairs are worth all of ``data``
    (null: more than it has), and ``intrinsic_noise``, the share of wrong labels if ``compared`` has none and is cut to the
    same size: only sensible for sets of one kind, on a ``benchmark`` that is clean. Similar pairs may be the informative ones
    for fine-grained targets: judge by target. Data without pairs give ``pairs`` 0.
    """
    layouts = read.paired(probe.layouts if data is None else read.encoded(probe, data, max_length=max_length, limit=limit))
    if not layouts:
        return {"pairs": 0}
    kind = Kind(probe, features)
    target = None if benchmark is None else kind(read.paired(read.encoded(probe, benchmark, max_length=max_length)))
    found, z = kind(layouts)
    rows, learn = _learner(found, z, target)
    own = [found[i] for i in rows]
    alike = _margins(probe, layouts)[rows] if similarity == "margin" else _alike(probe, own, similarity)
    curve, flipped, contrast = scale(learn, _same(own), seeds), noise(learn, len(own), seeds), information(learn, alike, seeds)
    out: dict[str, Any] = {
        "pairs": len(found), "trained": len(rows), "tested": len(learn.test), "features": features, "similarity": similarity,
        "n_95": curve.n_95, "noise_area": flipped.area, "q_half": flipped.q_half, "scale": curve.rows, "noise": flipped.rows,
        "bins": contrast["bins"], "histogram": contrast["histogram"],
    }  # fmt: skip
    if compared is not None:
        others = read.paired(read.encoded(probe, compared, max_length=max_length, limit=limit))
        out |= _compared(curve, flipped, *kind(others), learn, seeds)
    return out


class Kind:
    """``kind(layouts) -> (pairs, features [N, D], chosen less rejected)``."""

    def __init__(self, probe: Probe, features: str) -> None:
        self.probe, self.features = probe, features

    def __call__(self, layouts: list[Layout]) -> tuple[list[read.Pair], np.ndarray]:
        """Pairs and features, in the order of the layouts."""
        found = read.pairs(layouts)
        return found, read.hidden_differences(self.probe, layouts) if self.features == "hidden" else read.gram_differences(found)


Measured = tuple[list[read.Pair], np.ndarray]
"""Pairs and their features."""


def _learner(found: list[read.Pair], z: np.ndarray, target: Measured | None) -> tuple[np.ndarray, Learner]:
    """Rows to train on, and the learner on them: the rest of the data, or ``target``, validates and tests."""
    if len(found) < LEAST:
        raise UsageError(f"probe/preference-data: {len(found)} pairs are too few to tell anything", hint="Give data: FILE.")
    pairs, values, bounds = (found, z, (0.1, 0.3)) if target is None else (*target, (1 / 3, 1.0))
    names, place = np.unique([str(p.prompt) for p in pairs], return_inverse=True)
    share = np.random.default_rng(0).permutation(len(names))[place] / len(names)
    valid, test = share < bounds[0], (share >= bounds[0]) & (share < bounds[1])
    rows = np.flatnonzero(share >= bounds[1]) if target is None else np.arange(len(found))
    if not (valid.any() and test.any() and len(rows)):
        raise UsageError("probe/preference-data: too few prompts to keep some for testing", hint="Give another benchmark: FILE.")
    return rows, Learner(z[rows], values[valid], values[test])


def _same(found: list[read.Pair]) -> list[int]:
    numbers: dict[read.Pair, int] = {}
    return [numbers.setdefault(p, len(numbers)) for p in found]


def _alike(probe: Probe, found: list[read.Pair], by: str) -> np.ndarray:
    if by == "minilm":
        return similar.encoder_similarity(found, probe.bundle.tokenizer)
    return {"tfidf": similar.tfidf_similarity, "overlap": similar.overlap, "length": similar.length_ratio}[by](found)


@torch.no_grad()
def _margins(probe: Probe, layouts: list[Layout]) -> np.ndarray:
    """``[N]`` what the probed model says of the pair: rewards, or log-probabilities per token, chosen less rejected."""
    found = []
    for layout in layouts:
        seen = probe.score(layout, reads=Rewards if probe.reads is Rewards else Pairs)
        chosen, rejected = means(seen) if isinstance(seen, Pairs) else (seen.chosen, seen.rejected)  # type: ignore[union-attr]
        found.append((chosen - rejected).double().cpu().numpy())
    return np.concatenate(found)


def _compared(curve: Scale, flipped: Noise, found: list[read.Pair], z: np.ndarray, learn: Learner, seeds: int) -> dict[str, Any]:
    """The same curves of another set, with the same validation and test pairs, and what follows for the first one."""
    n = curve.n[-1]
    theirs = scale(Learner(z, learn.valid, learn.test), _same(found), seeds)
    equal = equivalent_size(theirs.n, theirs.accuracy, curve.n, curve.accuracy, n)
    cut = subset(range(len(found)), min(1.0, n / len(found)), 0)
    clean = noise(Learner(z[cut], learn.valid, learn.test), len(cut), seeds)
    return {
        "equivalent": None if np.isinf(equal) else equal,
        "intrinsic_noise": intrinsic_noise(RATES, flipped.accuracy, RATES, clean.accuracy),
        "compared_scale": theirs.rows, "compared_noise": clean.rows,
    }  # fmt: skip
