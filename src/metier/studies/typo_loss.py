"""Does an explicit divergence to the reference keep what was good already, where DPO's margin of log-ratios does not?

(i) Tables with exact Bradley-Terry labels and an exact divergence (μ has multiples of 1/256): from the data's distribution to
the reference as λ grows; half of the prompts with μ = softmax(r).

(ii) A language model that is gold-optimal on one class of prompts: the bench's fine-tuned model, trained for 120 steps more on
prompts of ``praise`` (G) answered with different good words only, whose gold reward is 1, the most there is, and on ``review``
(B) answered badly as ever. It is the start and the reference of all arms; its reward on G is told, and a note says so when it
is below 0.9: the premise then fails. Training: 4000 clean pairs of both classes, half each, answers of the data's mixture.
DPO and IPO with five values of β and τ each, TYPO with the card's five λ, three seeds; TYPO's divergence is estimated on two
answers of the start a pair. The loss on G is that of the gold reward; where DPO has none there, TYPO may have none either.
Smaller than the card's check: 100 steps, 256 answers of each class, and one learning rate for all, 1e-3, as the sweep is over
the trade-off.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from metier.compare.study import Check, Outcome, Study
from metier.lab import preferencebench, tabular, wordpairs, words
from metier.studies._arms import Arm, Arms, Try, size
from metier.studies._optimal_start import optimal, with_samples

PARTS = ("objective/typo", "objective/dpo", "objective/ipo")
CLAIM = (
    "A loss with an explicit divergence keeps the reference where it is optimal and interpolates to the data's distribution; "
    "losses of log-ratios to the reference cannot."
)
LAMBDAS = (0.0, 0.01, 0.1, 1.0, 10.0, 1000.0)
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "dpo": [{"dpo": {"beta": b}} for b in (0.01, 0.03, 0.1, 0.3, 1.0)],
    "ipo": [{"ipo": {"tau": t}} for t in (0.03, 0.1, 0.3, 1.0, 3.0)],
    "typo": [{"typo": {"lam": x}} for x in (0.01, 0.03, 0.1, 0.3, 1.0)],
}
OPTIMAL = 0.9


def run(study: Study) -> Outcome:
    """Tables, then the language model."""
    checks, figures = tables()
    more, seen = trained(study)
    notes = [] if seen["sweeps"]["dpo"][seen["best"]]["loss_on_g"] > 0 else ["DPO loses nothing on G here."]
    if seen["start"]["g"]["gold_reward"] < OPTIMAL:
        notes.append(f"The premise fails: the start's gold reward on G is {seen['start']['g']['gold_reward']:.3f}, not about 1.")
    return Outcome([*checks, *more], {"tables": figures, **seen}, notes)


# --- (i) -----------------------------------------------------------------------------------------------------


def tables() -> tuple[list[Check], dict[str, Any]]:
    """Interpolation and preservation."""
    bench = world()
    wanted = bench.gold.log_softmax(1)
    fits = [tabular.minimise({"typo": {"lam": x}}, bench).policy for x in LAMBDAS]
    away = [float(tabular.total_variation(p, bench.reference).mean()) for p in fits]
    data = float(tabular.total_variation(fits[0], wanted).max())
    near = float(tabular.total_variation(fits[-1], bench.reference).max())
    half = replace(bench, reference=torch.cat([rounded(wanted[:4]), bench.reference[4:]]))
    gold = torch.cat([half.reference[:4], half.gold[4:]])  # the rounding of μ is the truth there
    half = replace(half, gold=gold, preference=tabular.bradley_terry(gold))
    kept = max(_moved(half, {"typo": {"lam": x}}) for x in LAMBDAS)
    dpo = min(_moved(half, {"dpo": {"beta": b}}) for b in (0.1, 0.3, 1.0))
    return [
        Check("tables, λ = 0: from softmax(r), largest total variation", "< 1e-3", data, data < 1e-3),
        Check("tables, λ = 1000: from the reference", "< 1e-2", near, near < 1e-2),
        Check("tables: distance to the reference as λ grows", "falls", away, away == sorted(away, reverse=True)),
        Check("tables, μ already right: how far TYPO moves at any λ", "< 1e-3", kept, kept < 1e-3),
        Check("tables, μ already right: how far DPO moves, least of β <= 1", "> 0.05", dpo, dpo > 0.05),
    ], {"lambda": LAMBDAS, "distance": away}  # fmt: skip


def world() -> tabular.Bench:
    """A bench whose samples of the reference have exactly its probabilities."""
    bench = tabular.random_bench(prompts=8, answers=4, seed=0)
    return replace(bench, reference=rounded(bench.reference))


def rounded(logp: torch.Tensor) -> torch.Tensor:
    """Probabilities as multiples of 1/256, at least one each."""
    counts = (logp.exp() * tabular.DRAWS).round().clamp(min=1)
    at = counts.argmax(1, keepdim=True)
    counts = counts.scatter_add(1, at, tabular.DRAWS - counts.sum(1, keepdim=True))
    return (counts / tabular.DRAWS).log()


def _moved(bench: tabular.Bench, objective: dict[str, Any]) -> float:
    """Total variation to the reference on the first four prompts."""
    found = tabular.minimise(objective, bench).policy
    return float(tabular.total_variation(found, bench.reference)[:4].max())


# --- (ii) ----------------------------------------------------------------------------------------------------


def trained(study: Study) -> tuple[list[Check], dict[str, Any]]:
    """Gain on B against loss on G."""
    pairs = wordpairs.pairs(size(study, 4000), "two classes", classes=(words.EASY, words.HARD))
    hard, easy = (words.prompts(64, "measured", split="held-out", classes=(c,)) for c in (words.HARD, words.EASY))
    samples = 16 if study.quick else 256
    folder, start = optimal(study)

    def measured(bundle: Any, prompts: list[str]) -> dict[str, float]:
        return preferencebench.measure(bundle, start, prompts[:samples], samples=samples)

    def from_start(bundle: Any, base: Any) -> Mapping[str, float]:
        seen = measured(bundle, easy)  # "kl" of the bench would be that to its own fine-tuned model
        return {"easy_reward": seen["gold_reward"], "easy_kl": seen["kl"], "hard_kl": measured(bundle, hard)["kl"]}

    rows = {"clean": pairs, "sampled": with_samples(start, pairs)}
    bench = Arms(study, rows, steps=100, prompts=hard, held_out=[], samples=samples, more=from_start)
    before = {"b": measured(start, hard), "g": measured(start, easy)}
    sweeps: dict[str, list[dict[str, Any]]] = {}
    for name, objectives in SWEEPS.items():
        data, options = "sampled" if name == "typo" else "clean", {"model": str(folder)}
        settings = [Try(o, data=data, options=options) for o in objectives[: 1 if study.quick else None]]
        sweeps[name] = [_point(bench.fixed(s), before) for s in settings]
    best = max(range(len(sweeps["dpo"])), key=lambda i: sweeps["dpo"][i]["gain_on_b"])
    gain, loss = sweeps["dpo"][best]["gain_on_b"], max(0.0, sweeps["dpo"][best]["loss_on_g"])
    good = [p["objective"] for p in sweeps["typo"] if p["gain_on_b"] >= 0.9 * gain and p["loss_on_g"] <= 0.5 * loss]
    text = "settings of TYPO with 90 % of DPO's best gain on B and half of its loss on G"
    return [Check(text, "at least one", json.dumps(good), bool(good))], {"start": before, "best": best, "sweeps": sweeps}


def _point(arm: Arm, before: Mapping[str, dict[str, float]]) -> dict[str, Any]:
    """One setting on the plane, in sd of the start's answers to B."""
    sd = before["b"]["gold_sd"]
    return {
        "objective": arm.chosen.objective, "gain_on_b": (arm.mean() - before["b"]["gold_reward"]) / sd,
        "loss_on_g": (before["g"]["gold_reward"] - arm.mean("easy_reward")) / sd, "kl_on_b": arm.mean("hard_kl"),
        "kl_on_g": arm.mean("easy_kl"), "runs": list(arm.runs),
    }  # fmt: skip
