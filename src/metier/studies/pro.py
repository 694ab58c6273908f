"""Do rankings of four teach more than pairs, and do the reward gaps as temperatures help?

The bench's language model on 1500 prompts with four answers each: two of the model itself, one of its checkpoint after 150 of
850 steps, one of a model trained with DPO for 40 steps. Scores are the gold reward, brought to about 0 to 5. Maximum
likelihood of the best answer; DPO on best against worst and on all pairs; PRO on best and worst, on all four, and on
all four without temperatures. 64 answers are learnt from in each step: 32 pairs, 16 lists, or the best ones of 64 lists. Eight
settings each with one seed: four learning rates times two β (DPO) or two likelihood terms (PRO: the sum of the released code,
and the mean), eight learning rates of the same range for maximum likelihood. Then three other seeds. 75 steps throughout, those
of choosing too: shorter than the card's check, to fit into few minutes of one core.
"""

import itertools
import random
from typing import Any

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.lab import preferencebench, wordpairs, words
from metier.studies._arms import LRS, Arm, Arms, Try, gap, size, tries
from metier.studies._diverged import diverged

PARTS = ("objective/pro", "objective/dpo", "objective/nll")
CLAIM = "Learning from whole rankings beats fine-tuning on the best and learning from pairs; longer rankings help."
EARLY = 150
"""Steps of the weaker checkpoint, of 850."""
PAIRS = 4000
RATES = (*LRS, 1e-2)
STEPS = 75
Row = dict[str, Any]


def run(study: Study) -> Outcome:
    """Six arms on the same answers."""
    lists = candidates(study)
    ends = [_ends(r) for r in lists]
    data = {
        "pairs": [_pair(r["prompt"], *r["completions"]) for r in ends], "all-pairs": all_pairs(lists), "two": ends, "four": lists,
    }  # fmt: skip
    bench = Arms(study, data, steps=STEPS, tuning=STEPS)
    dpo: list[Any] = [{"dpo": {"beta": b}} for b in (0.1, 0.3)]
    eight = [float(x) for x in np.geomspace(RATES[0], RATES[-1], 8)]
    arms = {
        "sft": bench.tuned(tries(["nll"], eight, data="pairs", batch=64)),
        "dpo": bench.tuned(tries(dpo, RATES, data="pairs")),
        "dpo-all": bench.tuned(tries(dpo, RATES, data="all-pairs")),
        "pro-2": bench.tuned(tries(pro(), RATES, data="two")),
        "pro-4": bench.tuned(tries(pro(), RATES, data="four", batch=16)),
        "plain-4": bench.tuned(tries(pro(temperatures=False), RATES, data="four", batch=16)),
    }
    gaps = np.diff(np.sort([r["scores"] for r in lists]), axis=1)
    figures = {"gap_mean": float(gaps.mean()), "gap_sd": float(gaps.std()), "prompts": len(lists), **bench.report(**arms)}
    return Outcome(checks(arms, bench.sd), figures, [*bench.notes(**arms), *diverged(arms)])


def pro(**options: Any) -> list[Row]:
    """With both likelihood terms."""
    return [{"pro": {"sft": kind, **options}} for kind in ("sum", "mean")]


def candidates(study: Study) -> list[Row]:
    """Four different scored answers to each prompt."""
    number = size(study, 1500)
    early = preferencebench.sft() if study.quick else preferencebench.sft(steps=EARLY)
    models = [(preferencebench.sft(), 2), (early, 1), (_late(study), 1)]
    asked = words.prompts(number, "candidates")
    drawn = [preferencebench.draw(m, asked, n, seed=i) for i, (m, n) in enumerate(models)]
    found, rng, reward = [], random.Random("candidates"), words.gold("quality")
    for text, *parts in zip(asked, *drawn, strict=True):
        answers = [a for part in parts for a in part if a]
        if len(set(answers)) == 4:
            rng.shuffle(answers)
            found.append({"prompt": text, "completions": answers, "scores": [2.5 * (1 + reward(text, a)) for a in answers]})
    return [r for r in found if max(r["scores"]) > min(r["scores"])]


def _late(study: Study) -> Any:
    """A model that has learnt from other pairs."""
    from metier.core import models

    bench = Arms(study, {"clean": wordpairs.pairs(size(study, 1500), "late")})
    folder = bench.weights(Try({"dpo": {"beta": 0.1}}), seed=0, steps=40)
    return models.load(str(folder))


def _ends(row: Row) -> Row:
    """Best and worst."""
    order = sorted(range(4), key=lambda i: -row["scores"][i])
    return {"prompt": row["prompt"], **{k: [row[k][order[0]], row[k][order[-1]]] for k in ("completions", "scores")}}


def _pair(prompt: str, chosen: str, rejected: str) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def all_pairs(lists: list[Row]) -> list[Row]:
    """Every pair with an order, a random part of them."""
    found = [
        _pair(r["prompt"], r["completions"][i], r["completions"][j])
        for r in lists
        for i, j in itertools.permutations(range(4), 2)
        if r["scores"][i] > r["scores"][j]
    ]
    random.Random("all pairs").shuffle(found)
    return found[:PAIRS]


def checks(arms: dict[str, Arm], sd: float) -> list[Check]:
    """The card's expectations, in sd of the gold reward."""
    more, sft, plain = (gap(arms["pro-4"], arms[name], unit=sd)[0] for name in ("pro-2", "sft", "plain-4"))
    return [
        Check("PRO on four answers over PRO on two, sd", ">= 0.1", more, more >= 0.1),
        Check("PRO on four answers over fine-tuning on the best, sd", ">= 0.2", sft, sft >= 0.2),
        Check("PRO with temperatures over PRO without, sd", ">= 0", plain, plain >= 0),
    ]
