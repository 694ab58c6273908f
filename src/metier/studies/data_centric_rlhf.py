"""Do three measurements of a preference set say what is known of it: its wrong labels, its domain, its informative pairs?

Sets of the word language with noiseless labels from the gold reward, measured by probe/preference-data (a linear reward on the
fine-tuned model's mean hidden states), three seeds, on clean held-out pairs. (i) Q, 4000 prompts with one pair each, has 15 %
of its labels flipped; P, 500 prompts with 8 pairs each, has none and is the reference curve that Q's noise is read off.
(ii) R, 400 pairs of the target domain (prompts that ask for a review, words of synonym set B), against 4000 pairs of another
(praise, set A), on the target domain. (iii) 4000 pairs, a third of them near-duplicates (one or two words differ), in three bins
of TF-IDF similarity; the gold reward is a matter of single words.

Same sizes as the card's check, with two deviations: the card's third measurement embeds answers with a sentence encoder, here
their similarity is that of TF-IDF vectors (words only, no meaning); and the reward model is the probe's linear one, not a network
trained from end to end.
"""

import random
from collections.abc import Sequence
from typing import Any

from metier.compare.study import Check, Outcome, Study
from metier.core import models, part
from metier.lab import wordpairs, words
from metier.studies._reward_models import LENGTH, probe_of
from metier.studies._self_training import MODEL, written

PARTS = ("probe/preference-data",)
CLAIM = "Noise, domain match and response contrast of a preference set can be measured by small reward models before training."
NOISE = 0.15
TARGET: dict[str, Any] = {"classes": (words.HARD,), "synonyms": 0.0}
OTHER: dict[str, Any] = {"classes": (words.EASY,), "synonyms": 1.0}


def run(study: Study) -> Outcome:
    """The three measurements and the card's margins."""
    few = 40 if study.quick else 1
    files = {name: written(study.folder / f"{name}.jsonl", rows) for name, rows in sets(few).items()}
    noisy = measured(study, files, "noisy", "test", "clean")
    own = measured(study, files, "target", "target-test", "other")
    contrast = measured(study, files, "near", "test")
    wrong = noisy["intrinsic_noise"]
    lead = own["scale"][-1]["accuracy"] - own["compared_scale"][-1]["accuracy"]
    worth = own["equivalent"]  # null: more than the other set has
    low, high = (contrast["bins"][i]["accuracy"] for i in (0, -1))
    checks = [
        Check("intrinsic noise of a set with 15 % wrong labels", "0.15 ± 0.05", wrong, abs(wrong - NOISE) <= 0.05),
        Check("400 pairs of the domain above 4000 of another, accuracy", "> 0", lead, lead > 0),
        Check(
            "pairs of the other domain that are worth those 400", "> 2000", "more than there are" if worth is None else worth,
            worth is None or worth > 2000,
        ),
        Check("training on pairs of low similarity above those of high similarity", ">= 0.03", low - high, low - high >= 0.03),
    ]  # fmt: skip
    return Outcome(checks, {"noisy": noisy, "target": own, "near-duplicates": contrast})


def measured(study: Study, files: dict[str, str], data: str, benchmark: str, compared: str | None = None) -> dict[str, Any]:
    """Everything the probe says of one set."""
    options = {"data": files[data], "benchmark": files[benchmark], "seeds": 1 if study.quick else 3, "max_length": LENGTH}
    if compared is not None:
        options["compared"] = files[compared]
    return part.build("probe", {"preference-data": options}).obj(probe_of(models.load(MODEL), models.load(MODEL)))


def sets(few: int) -> dict[str, list[dict[str, Any]]]:
    """All sets, ``few`` times smaller."""
    clean: dict[str, Any] = {"temperature": 0.0}
    test: dict[str, Any] = {"seed": "data-centric", "split": "held-out", **clean}
    number, tested = 4000 // few, 1500 // min(few, 10)
    return {
        "clean": several(distinct(500 // few, "P"), 8, "P"),
        "noisy": several(distinct(number, "Q"), 1, "Q", flip=NOISE),
        "target": wordpairs.pairs(max(400 // few, 60), "R", **TARGET, **clean),
        "other": wordpairs.pairs(number, "other", **OTHER, **clean),
        "near": wordpairs.pairs(number, "near", near_share=1 / 3, **clean),
        "test": wordpairs.pairs(tested, **test), "target-test": wordpairs.pairs(tested, **test, **TARGET),
    }  # fmt: skip


def distinct(number: int, seed: str) -> list[str]:
    """So many different prompts; there are enough of them with a control word only."""
    return list(dict.fromkeys(words.prompts(4 * number, seed, control=1.0)))[:number]


def several(prompts: Sequence[str], each: int, seed: str, flip: float = 0.0) -> list[dict[str, Any]]:
    """``each`` pairs to every prompt, labelled without noise but for flips; ties are drawn again."""
    rng, rows = random.Random(f"several {seed}"), []
    for prompt in prompts:
        found = 0
        while found < each:
            a, b = words.answer(prompt, rng), words.answer(prompt, rng)
            row = wordpairs.label(prompt, a, b, rng, temperature=0.0, flip=flip)
            if row["score_chosen"] > row["score_rejected"]:
                rows.append(row)
                found += 1
    return rows
