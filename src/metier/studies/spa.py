"""Can a model that has learnt from 60 labelled pairs label its own answers and go on?

The bench's word model, whose gold reward is known; 60 pairs of its own answers with Bradley-Terry labels, then two rounds. In
each the model before it gives two answers at temperature 0.7 to new prompts, and trains on the first 600 pairs made of them, 20
steps of 30, with itself as the reference. Every arm has as many steps; a round that gives fewer pairs repeats them, and a note
says which did. Arms: the seeds alone (DPO, 3 epochs), SPA without refinement, with α = 0.1, with λ = 0.5 besides, labels of a
reward model trained on the same seeds, and labels of the gold reward. Many answers tie or do not end, so a round asks 3000
prompts. Refinement is off in the first fifth of each round, as in each of the paper's trainings; the share of softened labels
is a figure, and the check of refinement fails if there are none. Doubted pairs are those that the objective of the α = 0.1 arm
did doubt when it trained on them in round one.

The learning rate of the seeds is the best of four by gold reward among those with a KL to the start of at most 10 nats (as in the
study dpo; a first run without this had 25, and labels worse than a coin), that of every arm the best of three; the reward
model's is fixed. Choices are made with one seed on other prompts than those reported; three other seeds are then run. A reward
counts as one sd of the start's answers. Against the card: 3000 prompts a round and not 600, of which as many pairs are used.
"""

from collections.abc import Mapping

from metier.compare.study import Check, Outcome, Study
from metier.studies import _self_training as own
from metier.studies._spa_rounds import ARMS, RATES, SEED_RATES, SEEDS, Bench

PARTS = ("source/spa", "objective/spa")
CLAIM = "From 3 % of the labels, a model that labels its own answers by its implicit reward beats training on those labels alone."


def run(study: Study) -> Outcome:
    """Tune, run, compare."""
    bench = Bench(study, 60, samples=32) if study.quick else Bench(study)
    seeds, choices, rates = SEEDS[:1] if study.quick else SEEDS, {}, dict.fromkeys(ARMS, RATES[1])
    if not study.quick:
        bench.seed_rate, choices["seeds"] = own.best_of(SEED_RATES, bench.seed_score)
        for arm in ARMS:
            rates[arm], choices[arm] = own.best_of(RATES, lambda lr, a=arm: bench.score(a, lr))
    found = {arm: [bench.measured(bench.arm(arm, s, rates[arm], 2)) for s in seeds] for arm in ARMS}
    found["seeds"] = [bench.measured(bench.on_pairs("dpo", s, bench.seed_rate)) for s in seeds]
    labels = [bench.labels(s, rates["spa"]) for s in seeds]
    start = bench.measured(None)
    table = {k: {arm: own.mean(f[k] for f in rows) for arm, rows in found.items()} for k in ("gold_reward", "kl", "length")}
    by_seed = {arm: [f["gold_reward"] for f in rows] for arm, rows in found.items()}
    figures = {**table, "by_seed": by_seed, "start": start, "sweeps": choices, "labels": labels}
    notes = ["The learning rates tried were lowered once, after single runs at 3e-4 to 3e-3 in which answers grew ever longer."]
    if bench.few:
        notes.append("Fewer different pairs than 600: " + "; ".join(f"{k}: {n}" for k, n in bench.few.items()) + ".")
    notes += own.notes({**rates, "seeds": bench.seed_rate}, choices)
    return Outcome(checks(table["gold_reward"], start["gold_sd"], labels), figures, notes)


def checks(reward: Mapping[str, float], sd: float, labels: list[dict[str, float]]) -> list[Check]:
    """The card's predictions with its margins."""
    gain = (reward["spa"] - reward["seeds"]) / sd
    kept = (reward["spa"] - reward["spa-plain"]) / sd
    accuracy, apart = own.mean(x["accuracy"] for x in labels), own.mean(x["trusted"] - x["doubted"] for x in labels)
    on = min(x["share_softened"] for x in labels) > 0
    return [
        Check("gold reward of SPA over that of the seeds alone, in sd", ">= 0.3", gain, gain >= 0.3),
        Check("accuracy of the model's own labels in the first round", ">= 0.6", accuracy, accuracy >= 0.6),
        Check("label accuracy of trusted pairs over that of doubted ones", ">= 0.1", apart, apart >= 0.1),
        Check(
            "gold reward with refinement (which softened labels) over that without, in sd", ">= -0.05", kept, kept >= -0.05 and on
        ),
    ]
