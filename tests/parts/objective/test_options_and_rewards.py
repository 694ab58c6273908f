"""Default options, and the rewards that pair losses report, of the objectives from l to z: numbers of the papers and of released code.

An oracle that gives its options cannot see a default; one of the losses cannot see a metric. Bugs it is meant to catch: a default
changed unseen, an option that is not in the table, rewards without their β, of the wrong side, of sums for means.
"""

from pathlib import Path

import numpy as np
import pytest
from _listwise import drawn, scored
from _pairwise import build, letters, pairs

from metier.core import part

FOLDER = Path(part.__file__).parents[1] / "parts/objective"
PROGRAM = {"formula": "L -> W", "given": "true", "facts": "false", "code": None, "reference": False, "probability": "mean"}
SHAPE = dict.fromkeys(["coefficients", "reference", "probability", "beta", "lam_s", "lam_p"])
DEFAULTS = {
    "label-smoothing": {"rate": 0.1, "unbiased": False},
    "ld-dpo": {"beta": 0.1, "alpha": 0.5},
    "length-normalized": {},
    "lipo": {"beta": 0.1},
    "lm": {},
    "ln-dpo": {"beta": 5.0},  # Tulu 3
    "logic": {**PROGRAM, "link": "logistic", "beta": 1.0, "tau": 0.1, "nll_weight": 0.0},
    "mirror-po": {**SHAPE, "shape": "dpo", "tau": 0.1},
    "nash-md": {"tau": 0.1, "per": "sequence"},
    "nca": {"beta": 0.01},  # thu-ml/Noise-Contrastive-Alignment 's configurations
    "nca-list": {"beta": 0.01, "alpha": 1e-3},  # the same; α of its trainer
    "nll": {"reduction": "mean"},
    "npo": {"beta": 0.1, "retain_weight": 0.0},
    "odpo": {"beta": 0.1, "alpha": 1.0, "offset": "log"},  # rycolab/odpo
    "orpo": {"lam": 0.1},
    "pl-dpo": {"beta": 0.1},
    "pro": {"temperatures": True, "sft_weight": 0.05, "sft": "sum"},  # PRO/train/train_hh.sh
    "r-dpo": {"beta": 0.1, "alpha": 0.01},
    "r3f": {"weight": 1.0, "scale": 1e-5, "noise": "uniform", "over": "tokens"},
    "refdpo": {"reward": "ratio", "beta": 0.01},
    "robust-dpo": {"beta": 0.1, "label_smoothing": 0.1},
    "rpo": {"beta": 0.1, "alpha": 1.0},  # iterative RPO
    "rrhf": {"sft_weight": 1.0, "sft": "sum"},
    "sami": {"side": "symmetric"},
    "simper": {},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "slic-hf": {"delta": 1.0, "lam": 0.1},
    "spa": {"beta": 0.1, "lam": 0.0, "q": 0.1, "alpha": 0.1, "window": 1024, "warmup": 0.2},  # kingdy2002/SPA
    "sppo": {"beta": 1e-3, "preference": "hard", "scale": 1.0},
    "typo": {"lam": 0.1, "tau": 1.0},
    "unlikelihood": {"alpha": 1.0},
    "with-margin": {"scale": 1.0, "per": "answer"},
    "wpo": {"of": "dpo", "clamp": True},  # wzhouad/WPO
    "xpo": {"beta": 0.1, "alpha": 5e-6},
}


def test_the_table_is_whole():
    assert set(DEFAULTS) == {p.stem.replace("_", "-") for p in FOLDER.glob("[l-z]*.py")}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
    found = part.options(part.load(name, "objective"))
    assert {k: o.default for k, o in found.items() if not o.required} == DEFAULTS[name]


X = letters(pairs(samples=2))
RATIO = (X.Dw, X.Dl)
MEAN = (X.aw, X.al)
REWARDS = {
    "ln-dpo": ({"beta": 3.0}, 3.0, (X.Rw, X.Rl)),
    "logic": ({"beta": 0.7}, 0.7, MEAN),
    "mirror-po": ({"beta": 0.3}, 0.3, RATIO),
    "nca": ({"beta": 0.3}, 0.3, RATIO),
    "nll": ({}, 1.0, MEAN),
    "orpo": ({"lam": 0.3}, 0.3, MEAN),
    "r-dpo": ({"beta": 0.3, "alpha": 0.5}, 0.3, RATIO),
    "refdpo": ({"beta": 0.3}, 0.3, RATIO),
    "robust-dpo": ({"beta": 0.3}, 0.3, RATIO),
    "rpo": ({"beta": 0.3}, 0.3, RATIO),
    "simper": ({}, 1.0, (np.exp(X.aw), np.exp(X.al))),
    "simpo": ({"beta": 3.0}, 3.0, MEAN),
    "slic-hf": ({}, 1.0, (X.lw, X.ll)),
    "spa": ({"beta": 0.3}, 0.3, RATIO),
    "sppo": ({"beta": 0.3}, 0.3, RATIO),
    "typo": ({"tau": 4.0}, 0.25, (X.lw, X.ll)),
    "unlikelihood": ({}, 1.0, MEAN),
    "wpo": ({"of": {"dpo": {"beta": 0.3}}}, 0.3, RATIO),
    "xpo": ({"beta": 0.3}, 0.3, RATIO),
}
"""Options, the factor, and what it multiplies for both answers."""


@pytest.mark.parametrize("name", REWARDS)
def test_rewards(name):
    options, factor, (chosen, rejected) = REWARDS[name]
    metrics = build(name, **options)(pairs(samples=2))[1]
    np.testing.assert_allclose(metrics["chosen_reward"], factor * chosen, rtol=1e-12)
    np.testing.assert_allclose(metrics["rejected_reward"], factor * rejected, rtol=1e-12)
    np.testing.assert_allclose(metrics["margin"], factor * (chosen - rejected), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(metrics["accuracy"], (chosen > rejected).astype(float))
    assert not metrics["chosen_reward"].requires_grad


LOGPS, REF, SCORE = drawn(21)
ON_LISTS = {
    "lipo": ({"beta": 0.3}, 0.3 * (LOGPS - REF)),
    "nash-md": ({"tau": 0.3}, 0.3 * (LOGPS - REF)),
    "nca-list": ({"beta": 0.3}, 0.3 * (LOGPS - REF)),
    "pl-dpo": ({"beta": 0.3}, 0.3 * (LOGPS - REF)),
    "pro": ({}, LOGPS / 5),
    "rrhf": ({}, LOGPS / 5),
}
"""Options, and the rewards of four answers of five tokens."""


@pytest.mark.parametrize("name", ON_LISTS)
def test_rewards_of_lists(name):
    """Of the best and of the worst answer, and how many of the six pairs have the right order."""
    options, reward = ON_LISTS[name]
    metrics = scored(name, LOGPS, SCORE, REF, **options)[2]
    for i in range(3):
        order = np.argsort(-SCORE[i])
        right = [reward[i][j] > reward[i][k] for a, j in enumerate(order) for k in order[a + 1 :]]
        assert metrics["chosen_reward"][i] == pytest.approx(reward[i][order[0]], rel=1e-9)
        assert metrics["rejected_reward"][i] == pytest.approx(reward[i][order[-1]], rel=1e-9)
        assert metrics["accuracy"][i] == pytest.approx(np.mean(right))
    assert not metrics["accuracy"].requires_grad


def test_terms_that_are_reported_beside_the_rewards():
    b = pairs(samples=2)
    np.testing.assert_allclose(build("rpo")(b)[1]["nll"], -X.aw, rtol=1e-12)
    np.testing.assert_allclose(build("xpo", alpha=0.3)(b)[1]["bonus"], 0.3 * b.sampled_logps.numpy().mean(1), rtol=1e-12)
    kl = (b.ref_sampled_logps - b.sampled_logps).numpy().mean(1)
    np.testing.assert_allclose(build("typo", lam=0.7)(b)[1]["kl"], kl, rtol=1e-12)
