"""All preference losses on pairs, on four kinds of data: what each does to reward, KL, length and likelihoods.

The bench's language model, 32 steps of 32 pairs, each pair seen once, learning rate 1e-3, two seeds, options at their defaults
unless the sheet's figures say otherwise (a flip rate of 0.3 is told to cDPO and rDPO). Data: clean; 30 % of the labels flipped;
longer answers preferred (70 % of the chosen ones are the longer); near-duplicates, which differ in one or two words. Changes of
log-probabilities are of 200 held-out clean pairs, for near-duplicates of such. Losses of single answers see the pairs unpaired.
Rewards are differences to the start in sd of its answers. Nothing is tuned, so a row says what a loss does at equal steps,
not what it can reach: β is not comparable across losses, compare at equal KL. Under flips "at least as good as DPO" is of the
mean gold reward. One command, half of the card's time: 256 samples and 32 steps a cell. ``nll`` learns from the 32 chosen
answers only. Losses that diverge are named in the notes: a mark of one of these may hold because its model has broken down.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.lab import preferencebench, wordpairs
from metier.studies._arms import Arm, Arms, Try, size
from metier.studies._diverged import diverged

PAIRS: dict[str, Any] = {
    "dpo": "dpo", "cdpo": {"cdpo": {"label_smoothing": 0.3}}, "robust-dpo": {"robust-dpo": {"label_smoothing": 0.3}},
    "ipo": "ipo", "hinge": "hinge", "exo": "exo", "discopop": "discopop", "f-dpo (js)": "f-dpo",
    "f-dpo (forward-kl)": {"f-dpo": {"divergence": "forward-kl"}}, "f-dpo (alpha)": {"f-dpo": {"divergence": "alpha"}},
    "ln-dpo": "ln-dpo", "ld-dpo": "ld-dpo", "r-dpo": "r-dpo", "odpo": "odpo", "with-margin": {"with-margin": {"of": "dpo"}},
    "beta-dpo": "beta-dpo", "dr-dpo": "dr-dpo", "wpo": "wpo", "alpha-dpo": "alpha-dpo", "dpop": "dpop", "rpo": "rpo",
    "cal-dpo": "cal-dpo", "aot": "aot", "sppo": "sppo", "nca": "nca", "bco-pair": "bco-pair", "apo-zero": "apo-zero",
    "apo-down": "apo-down", "simpo": "simpo", "alphapo": "alphapo", "orpo": "orpo", "cpo": "cpo", "slic-hf": "slic-hf",
    "simper": "simper", "exmate": "exmate", "unlikelihood": "unlikelihood", "typo": "typo", "dil (lsif)": "dil",
    "dil (ukl)": {"dil": {"f": "ukl"}}, "dil (bce)": {"dil": {"f": "bce"}}, "logic": "logic", "mirror-po": "mirror-po",
    "nll": "nll",
}  # fmt: skip
SINGLE = ("kto", "apo-zero-unpaired", "bco", "aot-unpaired")
MOVING = "tr-dpo"
"""DPO whose reference follows: a hook."""
KINDS: dict[str, dict[str, Any]] = {
    "clean": {}, "flipped": {"flip": 0.3}, "long": {"length_bonus": wordpairs.LONG_BONUS}, "near": {"near_share": 1.0},
}  # fmt: skip
KEEPS = ("dpop", "rpo", "orpo", "simper", "dil (lsif)", "dil (ukl)", "dil (bce)")
ROBUST = ("robust-dpo", "cdpo", "ipo", "kto")
SHORT = ("ln-dpo", "simpo", "r-dpo")
PARTS = (
    *(f"objective/{n}" for n in sorted({k.split(" ")[0] for k in PAIRS} | set(SINGLE))), "hook/tr-dpo",
)  # fmt: skip
CLAIM = (
    "Losses that bind the chosen answer's own likelihood keep it where DPO loses it; losses made for noise stand flipped "
    "labels; losses per token stay short where labels prefer length."
)
STEPS = 32


def run(study: Study) -> Outcome:
    """The sheet."""
    sheet = {kind: _kind(study, kind, how) for kind, how in KINDS.items()}
    figures = {
        "sheet": {kind: {name: _row(arm, bench) for name, arm in arms.items()} for kind, (bench, arms) in sheet.items()},
        "objectives": PAIRS, "start": sheet["clean"][0].base,
    }  # fmt: skip
    arms = {kind: found for kind, (_, found) in sheet.items()}
    notes = [note for kind, found in arms.items() for note in diverged(found, f"{kind} data")]
    found = [*kept(arms["near"]), *robust(arms["flipped"]), *short(arms["long"]), by_design(arms["clean"])]
    return Outcome(found, figures, notes)


def _kind(study: Study, kind: str, how: dict[str, Any]) -> tuple[Arms, dict[str, Arm]]:
    """Every loss on one kind of data."""
    rows = wordpairs.pairs(size(study, 32 * STEPS), kind, **how)
    drawn = preferencebench.draw(preferencebench.sft(), [r["prompt"] for r in rows], 1, seed=1)
    sampled = [{**r, "samples": s} for r, s in zip(rows, drawn, strict=True) if all(s)]
    held_out = wordpairs.pairs(size(study, 200), "measured", split="held-out", near_share=how.get("near_share", 0.0))
    bench = Arms(study, {kind: rows, "sampled": sampled}, steps=STEPS, seeds=2, samples=256, held_out=held_out)
    return bench, {name: bench.fixed(_setting(name, kind)) for name in _names(study, kind)}


def _names(study: Study, kind: str) -> Sequence[str]:
    """All losses; two a kind when quick."""
    if study.quick:
        return ("dpo", {"clean": "apo-down", "flipped": "kto", "long": "ln-dpo", "near": "simper"}[kind])
    return (*PAIRS, *SINGLE, MOVING)


def _setting(name: str, kind: str) -> Try:
    if name == MOVING:
        return Try("dpo", data=kind, options={"overrides": ["hooks=[{tr-dpo: {share: 0.6, every: 8}}]"]})
    if name in SINGLE:
        return Try(name, data=kind, options={"batch": 64})
    return Try(PAIRS[name], data="sampled" if name == "typo" else kind)


def _row(arm: Arm, bench: Arms) -> dict[str, list[float]]:
    """The sheet's columns, one number a seed."""
    reward = (arm.values() - bench.base["gold_reward"]) / bench.sd
    rest = ("kl", "length", "chosen_change", "rejected_change", "accuracy", "degenerate")
    return {"reward_in_sd": reward.tolist(), **{k: arm.values(k).tolist() for k in rest}}


# --- the expected marks ----------------------------------------------------------------------------------------------


def kept(arms: Mapping[str, Arm]) -> list[Check]:
    """Chosen log-probabilities on near-duplicates, seed by seed."""
    text = "near-duplicates, {}: change of the chosen log-probability, nats, every seed"
    falls = arms["dpo"].values("chosen_change")
    found = [Check(text.format("dpo"), "< 0", falls.tolist(), bool((falls < 0).all()))]
    for name in (n for n in KEEPS if n in arms):
        change = arms[name].values("chosen_change")
        found.append(Check(text.format(name), ">= 0", change.tolist(), bool((change >= 0).all())))
    return found


def robust(arms: Mapping[str, Arm]) -> list[Check]:
    """Gold reward under flips."""
    return [_over(arms, name, "gold_reward", 1, f"30 % flips: gold reward of {name} over dpo") for name in ROBUST if name in arms]


def short(arms: Mapping[str, Arm]) -> list[Check]:
    """Length where labels prefer it."""
    return [_over(arms, n, "length", -1, f"longer preferred: words fewer with {n} than dpo", "> 0") for n in SHORT if n in arms]


def _over(arms: Mapping[str, Arm], name: str, key: str, sign: int, text: str, expected: str = ">= 0") -> Check:
    gap = sign * float(np.mean(arms[name].values(key) - arms["dpo"].values(key)))
    return Check(text, expected, gap, gap > 0 or (gap == 0 and expected == ">= 0"))


def by_design(arms: Mapping[str, Arm]) -> Check:
    """apo-down."""
    change = arms["apo-down"].mean("chosen_change")
    return Check("clean labels, apo-down: change of the chosen log-probability, nats", "< 0", change, change < 0)
