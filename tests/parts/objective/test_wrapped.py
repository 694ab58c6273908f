"""Wrappers around every objective on pairs: each either refuses it, or does to it what its own text says.

``with-margin``, ``length-normalized`` and ``label-smoothing`` are the inner objective on pairs that are changed here by hand, ``wpo``
is its loss times a weight. Bugs it is meant to catch: an inner objective that is taken though it reads scores that stay as they were,
a field forgotten, a state fed with the scores before the change, needs or progress that do not arrive.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _pairwise import build, loss_of, pairs, values

from metier.core import part
from metier.core.batch import Lists, Pairs, Rated, Tokens
from metier.core.errors import UsageError
from metier.core.lossmodule import batch_type, scores_again
from metier.testing._sample import sample

FOLDER = Path(part.__file__).parents[1] / "parts/objective"
WRAPPERS = ("label-smoothing", "length-normalized", "with-margin", "wpo")
NAMES = sorted(p.stem.replace("_", "-") for p in FOLDER.glob("[a-z]*.py"))
READS = {n: None if scores_again(o := sample(f"objective/{n}").obj) else batch_type(o) for n in NAMES}
INNER = [n for n in NAMES if READS[n] is Pairs and n not in WRAPPERS]
TOKENS = {"ld-dpo", "unlikelihood"}
SAMPLES = {"typo", "xpo"}
WHOLE = {"alpha-dpo", "aot", "beta-dpo", "dr-dpo", "spa"}
"""What the losses read beyond sums: tokens, samples, all pairs of a step."""
OPTIONS = {"combined": {"losses": ["dpo", {"typo": {"lam": 0.0}}]}}


def batch(seed=1):
    """Six pairs with everything an objective can ask for."""
    rng = np.random.default_rng(seed)
    return replace(pairs(seed, samples=2), margin=torch.tensor(rng.uniform(0.2, 2.0, 6)))


def lowered(b, scale):
    return replace(b, chosen_logps=b.chosen_logps - scale * b.margin)


def averaged(b):
    one = torch.ones(6, dtype=torch.float64)
    return Pairs(
        b.chosen_logps / b.chosen_len, b.rejected_logps / b.rejected_len, one, one,
        b.ref_chosen_logps / b.chosen_len, b.ref_rejected_logps / b.rejected_len, b.margin,
    )  # fmt: skip


def swapped(b):
    """Pair by pair, token by token."""
    t, picks = b.tokens, []
    for i in range(6):
        for side in (1, 0):
            picks += [(k, 2 * i + 1 - side) for k in range(len(t.logps)) if t.sequence[k] == 2 * i + side]
    at = [k for k, _ in picks]
    tokens = Tokens(t.logps[at], t.weights[at], torch.tensor([s for _, s in picks]), t.ref_logps[at], collision=t.collision[at])
    return Pairs(
        b.rejected_logps, b.chosen_logps, b.rejected_len, b.chosen_len, b.ref_rejected_logps, b.ref_chosen_logps, -b.margin,
        b.sampled_logps, b.sampled_len, b.ref_sampled_logps, tokens,
    )  # fmt: skip


def wrapped(wrapper, name, **options):
    return build(wrapper, of={name: OPTIONS.get(name, {})}, **options)


def gradients(objective, b):
    """By both answers' log-probabilities and by those of their tokens, as if they were independent; 0 where none flows."""
    leaves = [x.detach().clone().requires_grad_() for x in (b.chosen_logps, b.rejected_logps, b.tokens.logps)]
    tokens = replace(b.tokens, logps=leaves[2])
    loss = loss_of(objective, replace(b, chosen_logps=leaves[0], rejected_logps=leaves[1], tokens=tokens)).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def same(objective, expected):
    """Values and gradients of ``objective`` against a function of the pairs."""
    b = batch()
    np.testing.assert_allclose(values(objective, b), values(expected, b), rtol=1e-10, atol=1e-12)
    for found, wanted in zip(gradients(objective, b), gradients(expected, b), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_every_objective_on_pairs_is_here():
    assert set(INNER) >= {"dpo", "logic", "mirror-po", "nca", "sppo", "refdpo"} | TOKENS | SAMPLES | WHOLE
    needs = {n: build(n, **OPTIONS.get(n, {})) for n in INNER}
    needs = {n: getattr(o, "needs", None) or part.load(n, "objective").__metier__.needs for n, o in needs.items()}
    for group, need in ((TOKENS, "tokens"), (SAMPLES, "samples"), (WHOLE, "batch")):
        assert {n for n in INNER if need in needs[n]} == group


@pytest.mark.parametrize("name", INNER)
def test_with_margin(name):
    if name in TOKENS:
        with pytest.raises(UsageError, match=f"{name} reads scores of single tokens"):
            wrapped("with-margin", name)
        return
    inner = build(name, **OPTIONS.get(name, {}))
    same(wrapped("with-margin", name, scale=0.3), lambda b: inner(lowered(b, 0.3)))


@pytest.mark.parametrize("name", INNER)
def test_length_normalized(name):
    if name in TOKENS | SAMPLES:
        with pytest.raises(UsageError, match=f"{name} reads scores of .* no normalized form"):
            wrapped("length-normalized", name)
        return
    inner = build(name, **OPTIONS.get(name, {}))
    same(wrapped("length-normalized", name), lambda b: inner(averaged(b)))


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("name", INNER)
def test_label_smoothing(name, unbiased):
    objective, inner = wrapped("label-smoothing", name, rate=0.2, unbiased=unbiased), build(name, **OPTIONS.get(name, {}))
    if name == "odpo":
        with pytest.raises(UsageError, match="odpo: with the two answers exchanged"):
            objective(batch())
        return

    def expected(b):
        right, wrong = loss_of(inner, b), loss_of(inner, swapped(b))
        return (0.8 * right - 0.2 * wrong) / 0.6 if unbiased else 0.8 * right + 0.2 * wrong

    same(objective, expected)


@pytest.mark.parametrize("name", INNER)
def test_wpo(name):
    if name in WHOLE:
        with pytest.raises(UsageError, match=f"{name} mixes those of a step"):
            wrapped("wpo", name)
        return
    b, inner = batch(), build(name, **OPTIONS.get(name, {}))
    t, weight = b.tokens, []
    for i in range(6):
        sides = [np.mean((t.logps - t.collision)[t.sequence == 2 * i + s].numpy()) for s in (0, 1)]
        weight.append(min(1.0, np.exp(sum(sides))))

    same(wrapped("wpo", name), lambda b: torch.tensor(weight) * loss_of(inner, b))


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", [n for n in NAMES if READS[n] is not Pairs])
def test_what_reads_no_pairs_is_refused(wrapper, name):
    """But by length-normalized, which knows single and listed answers too."""
    if wrapper == "length-normalized" and READS[name] in (Rated, Lists) and name != "kto":
        assert wrapped(wrapper, name).reads is READS[name]
        return
    with pytest.raises(UsageError, match=f"objective/{wrapper}, of {name}: objective/{name} "):
        wrapped(wrapper, name)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_needs_are_taken_over(wrapper):
    more = {"tokens", "collision"} if wrapper == "wpo" else set()
    for name, own in (("dpo", {"reference"}), ("simpo", set()), ("cpo", set()), ("nca", {"reference"})):
        assert wrapped(wrapper, name).needs == own | more
    if wrapper != "wpo":
        assert "batch" in wrapped(wrapper, "beta-dpo").needs


CHANGES = {
    "with-margin": lambda b: lowered(b, 1.0), "length-normalized": averaged, "label-smoothing": lambda b: b,
}  # fmt: skip


@pytest.mark.parametrize("wrapper", CHANGES)
@pytest.mark.parametrize("name", ["alpha-dpo", "beta-dpo", "spa"])
def test_a_state_follows_the_scores_that_the_inner_objective_is_given(wrapper, name):
    objective, inner = wrapped(wrapper, name), build(name)
    for seed in (3, 4):
        objective.observe(batch(seed))
        inner.observe(CHANGES[wrapper](batch(seed)))
    assert objective.state_dict() == {name: inner.state_dict()}
    assert inner.state_dict() != build(name).state_dict()
    again = wrapped(wrapper, name)
    again.load_state_dict(objective.state_dict())
    np.testing.assert_array_equal(values(again, batch()), values(objective, batch()))


@pytest.mark.parametrize("wrapper", CHANGES)
def test_progress_arrives(wrapper):
    objective = wrapped(wrapper, "spa", **({"scale": 0.5} if wrapper == "with-margin" else {}))
    objective.progress = 0.125
    assert objective.parts["spa"].obj.progress == objective.progress == 0.125
