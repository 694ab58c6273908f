"""Default options of all objectives, and the rewards that they report: numbers of the papers and of released code.

An oracle that gives its options cannot see a default; one of the losses cannot see a metric. Bugs it is meant to catch: a default
changed unseen, an option that is not in the table, rewards without their β, of the wrong side, of sums for means, a loss that mixes
the pairs of a step and does not say so.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from _listwise import drawn, scored
from _pairwise import build, letters, pairs

from metier.core import part
from metier.core.batch import Rated
from metier.testing._sample import sample

FOLDER = Path(part.__file__).parents[1] / "parts/objective"
PROGRAM = {"formula": "L -> W", "given": "true", "facts": "false", "code": None, "reference": False, "probability": "mean"}
SHAPE = dict.fromkeys(["coefficients", "reference", "probability", "beta", "lam_s", "lam_p"])
DEFAULTS = {
    # junkangwu/alpha-DPO, the Llama 3 configuration; its clip is this library's
    "alpha-dpo": {"beta": 2.5, "gamma_ratio": 0.6, "alpha": 0.2, "momentum": 0.9, "bias_correction": True, "clip": 3.0},
    "alphapo": {"alpha": 0.25, "beta": 2.5, "gamma": 0.25},  # the paper's for Mistral: γ/β 0.1
    "aot": {"beta": 0.01, "label_smoothing": 0.0},
    "aot-unpaired": {"beta": 0.01},
    "apo-down": {"beta": 0.1},
    "apo-zero": {"beta": 0.1},
    "apo-zero-unpaired": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "bco": {"beta": 0.01, "shift": "balanced"},
    "bco-pair": {"beta": 0.01},  # appendix C of the paper
    # the filter of junkangwu/beta-DPO keeps 0.8
    "beta-dpo": {"beta": 0.1, "a": 0.6, "momentum": 0.9, "keep": 1.0, "bias_correction": True},
    "bradley-terry": {"margin_scale": 0.0, "centering": 0.0},
    "cal-dpo": {"beta": 0.1, "weight": 0.5},  # the weight of tengxiao1/Cal-DPO
    "cdpo": {"beta": 0.1, "label_smoothing": 0.1},
    "classify": {"smoothing": 0.0},
    "combined": {"weights": None},
    "cpo": {"beta": 0.1, "c": 1.0, "loss": "sigmoid"},
    "dil": {"f": "lsif", "average": True, "beta": 1.0},  # tengxiao1/DIL 's scripts
    "discopop": {"beta": 0.1, "tau": 0.05},
    "dpo": {"beta": 0.1},
    "dpop": {"beta": 0.3, "lam": 50.0},
    "dr-dpo": {"beta": 0.1, "beta_prime": 1.0},  # junkangwu/Dr_DPO
    "dro": {"tau": 1.0},
    "exmate": {"lam": 0.05},  # CausalDialogue's mate_coef
    "exo": {"beta": 0.1, "label_smoothing": 1e-3},
    "exo-list": {"beta": 0.1, "beta_r": 0.1},  # haozheji/exact-optimization, the IMDb script
    "f-dpo": {"beta": 0.1, "divergence": "js", "alpha": 0.5},
    "hinge": {"beta": 0.1},
    "infonca": {"beta": 0.01, "alpha": 1e-3},  # thu-ml/Noise-Contrastive-Alignment
    "ipo": {"tau": 0.1, "average": True},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
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
    assert set(DEFAULTS) == {p.stem.replace("_", "-") for p in FOLDER.glob("[a-z]*.py")}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
    found = part.options(part.load(name, "objective"))
    assert {k: o.default for k, o in found.items() if not o.required} == DEFAULTS[name]


X = letters(pairs(samples=2))
RATIO = (X.Dw, X.Dl)
MEAN = (X.aw, X.al)
SHAPED = tuple((1 - np.exp(a) ** -0.5) / 0.5 for a in MEAN)
REWARDS = {
    "alpha-dpo": ({"beta": 3.0}, 3.0, MEAN),
    "alphapo": ({"beta": 3.0, "alpha": 0.5}, 3.0, SHAPED),
    "aot": ({"beta": 0.3}, 0.3, RATIO),
    "apo-down": ({"beta": 0.3}, 0.3, RATIO),
    "apo-zero": ({"beta": 0.3}, 0.3, RATIO),
    "bco-pair": ({"beta": 0.3}, 0.3, RATIO),
    "beta-dpo": ({"beta": 0.3}, 0.3, RATIO),
    "cal-dpo": ({"beta": 0.3}, 0.3, RATIO),
    "cdpo": ({"beta": 0.3}, 0.3, RATIO),
    "cpo": ({"beta": 0.3}, 0.3, (X.lw, X.ll)),
    "dil": ({"beta": 0.3}, 0.3, (X.Rw, X.Rl)),
    "discopop": ({"beta": 0.3}, 0.3, RATIO),
    "dpo": ({"beta": 0.3}, 0.3, RATIO),
    "dpop": ({"beta": 0.1}, 0.1, RATIO),
    "dr-dpo": ({"beta": 0.3}, 0.3, RATIO),
    "exmate": ({"lam": 0.3}, 1.0, MEAN),
    "exo": ({"beta": 0.3}, 0.3, RATIO),
    "f-dpo": ({"beta": 0.3}, 0.3, tuple(np.log(2 * np.exp(d) / (1 + np.exp(d))) for d in RATIO)),
    "hinge": ({"beta": 0.3}, 0.3, RATIO),
    "ipo": ({"tau": 0.3}, 0.3, (X.Rw, X.Rl)),
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
    "dro": ({"tau": 0.3}, 0.3 * (LOGPS - REF)),
    "exo-list": ({"beta": 0.3}, 0.3 * (LOGPS - REF)),
    "infonca": ({"beta": 0.3}, 0.3 * (LOGPS - REF)),
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


LABEL = np.array([True, False, True, True, False, False, False])
SINGLE, SINGLE_REF, OTHER, OTHER_REF = -9 * np.random.default_rng(5).random((4, 7)) - [[0], [0], [0], [2]]


@pytest.mark.parametrize("name", ["aot-unpaired", "apo-zero-unpaired", "bco", "kto", "npo"])
def test_rewards_of_single_answers(name):
    """``β log π/π_ref``; right where it is on the label's side of the point that the loss compares it with."""
    numbers = (SINGLE, np.full(7, 4.0), LABEL, SINGLE_REF, OTHER, OTHER_REF)
    b, objective = Rated(*map(torch.tensor, numbers)), build(name, beta=0.3)
    reward = 0.3 * (SINGLE - SINGLE_REF)
    point = {"bco": (reward[LABEL].mean() + reward[~LABEL].mean()) / 2, "kto": 0.3 * max(0, (OTHER - OTHER_REF).mean())}
    if name == "bco":
        objective.observe(b)
    metrics = objective(b)[1]
    np.testing.assert_allclose(metrics["reward"], reward, rtol=1e-12)
    np.testing.assert_array_equal(metrics["accuracy"], (reward > point.get(name, 0.0)) == LABEL)
    if "batch" in part.load(name, "objective").__metier__.needs:
        means = reward[LABEL].mean(), reward[~LABEL].mean()
        found = [metrics[k].item() for k in ("chosen_reward", "rejected_reward", "margin")]
        np.testing.assert_allclose(found, [*means, means[0] - means[1]], rtol=1e-12)


def test_losses_that_see_all_pairs_of_a_step_say_so():
    """Sorted ones, those with statistics of a batch, and those with a state, which must not depend on how a step is split."""
    whole = {name for name in DEFAULTS if "batch" in sample(f"objective/{name}").needs}
    assert whole == {"alpha-dpo", "aot", "aot-unpaired", "bco", "beta-dpo", "dr-dpo", "kto", "spa"}


def test_terms_that_are_reported_beside_the_rewards():
    b = pairs(samples=2)
    for name in ("cpo", "rpo"):
        np.testing.assert_allclose(build(name)(b)[1]["nll"], -X.aw, rtol=1e-12)
    np.testing.assert_allclose(build("xpo", alpha=0.3)(b)[1]["bonus"], 0.3 * b.sampled_logps.numpy().mean(1), rtol=1e-12)
    kl = (b.ref_sampled_logps - b.sampled_logps).numpy().mean(1)
    np.testing.assert_allclose(build("typo", lam=0.7)(b)[1]["kl"], kl, rtol=1e-12)
    both = build("combined", losses=["dpo", "nll"], weights=[0.5, 2.0])(b)[1]
    np.testing.assert_allclose(both["nll/loss"].detach(), -X.aw, rtol=1e-12)
