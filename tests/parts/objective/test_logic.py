"""Compiled losses against closed forms in float64 NumPy, the library's own CPO, ORPO and DPO, and brute-force counts.

Bugs it is meant to catch: the complement instead of the loser formula, sums where means are meant, the link's β in the wrong
place, a lift with the sign of the reference turned, gradients lost on one side, 1 - p computed by cancellation.
"""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from _pairwise import build, letters, of, pairs, ref_randomised, sig, slopes, softplus, values

from metier.core import part
from metier.core.errors import UsageError
from metier.parts.objective._codes import lift
from metier.parts.objective._programs import KNOWN, enumerate_codes
from metier.testing import check_part

B = replace(pairs(0, 12), tokens=None)
A = letters(B)
P, Q = np.exp(A.aw), np.exp(A.al)


def logic(**options):
    return build("logic", **options)


def program(name, **options):
    formula, given, facts, _ = KNOWN[name]
    return logic(formula=formula, given=given, facts=facts, **options)


def test_contract():
    check_part("objective/logic")


CLOSED = {
    "ce": (-A.aw, -1 + 0 * P, 0 * Q),
    "ce-unlikelihood": (-A.aw - np.log1p(-Q), -1 + 0 * P, Q / (1 - Q)),
    "cpo": (softplus(A.al - A.aw), -sig(A.al - A.aw), sig(A.al - A.aw)),
    "orpo": (
        softplus(np.log(Q * (1 - P) / (P * (1 - Q)))),
        -Q * (1 - P) / (P * (1 - Q) + Q * (1 - P)) / (1 - P),
        Q * (1 - P) / (P * (1 - Q) + Q * (1 - P)) / (1 - Q),
    ),
    "implication": (-np.log1p(-Q * (1 - P)), -P * Q / (1 - Q * (1 - P)), Q * (1 - P) / (1 - Q * (1 - P))),
    "constrained": (np.log1p(Q * (1 - P) / P), -(Q / P) / (1 + Q * (1 - P) / P), (Q * (1 - P) / P) / (1 + Q * (1 - P) / P)),
}
"""Loss, and its slopes by both token means, at β = 1."""


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms(name):
    loss, by_w, by_l = CLOSED[name]
    objective = program(name)
    assert objective.needs == frozenset()
    np.testing.assert_allclose(values(objective, B), loss, rtol=1e-9, atol=1e-12)
    g_w, g_l = slopes(objective, B)
    np.testing.assert_allclose(g_w, by_w / A.nw, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(g_l, by_l / A.nl, rtol=1e-7, atol=1e-12)


def brute(code, p):
    """``ρ`` by summing the table's rows."""
    top = bottom = 0.0
    for sign, row in zip(code, product((True, False), repeat=len(p)), strict=True):
        weight = np.prod([q if v else 1 - q for q, v in zip(p, row, strict=True)], axis=0)
        top, bottom = top + weight * (sign in "+*"), bottom + weight * (sign in "-*")
    return np.log(top) - np.log(bottom)


@pytest.mark.parametrize("code", [*enumerate_codes(strict=True), "+.*-", "..+-", "-++-"])
@pytest.mark.parametrize("reference", [False, True])
def test_any_code(code, reference):
    rho = brute(code, [P, Q])
    if reference:
        frozen = [np.exp(B.ref_chosen_logps.numpy() / A.nw), np.exp(B.ref_rejected_logps.numpy() / A.nl)]
        rho = rho - brute(code, frozen)
        np.testing.assert_allclose(rho, brute(lift(code), [P, Q, *frozen]), rtol=1e-9)
        four = logic(code=lift(code), beta=0.7)
        np.testing.assert_allclose(values(four, B), softplus(-0.7 * rho), rtol=1e-9)
    objective = logic(code=code, reference=reference, beta=0.7)
    assert objective.needs == (frozenset(["reference"]) if reference else frozenset())
    np.testing.assert_allclose(values(objective, B), softplus(-0.7 * rho), rtol=1e-9)
    np.testing.assert_allclose(objective(B)[1]["rho"].numpy(), rho, rtol=1e-9)


def test_links():
    rho = np.log(P / Q)
    cpo = {"given": "W or L", "facts": "W and L"}
    np.testing.assert_allclose(values(logic(**cpo, link="squared", tau=0.25, beta=3.0), B), (rho - 2) ** 2, rtol=1e-9)
    np.testing.assert_allclose(values(logic(**cpo, link="margin", beta=0.4), B), np.maximum(0, 0.4 - rho), rtol=1e-9)
    np.testing.assert_allclose(values(logic(**cpo, beta=3.0), B), softplus(-3 * rho), rtol=1e-9)
    np.testing.assert_allclose(values(logic(**cpo, beta=3.0, nll_weight=0.2), B), softplus(-3 * rho) - 0.2 * A.aw, rtol=1e-9)


def same(a, b, batch=B, rtol=1e-6):
    np.testing.assert_allclose(values(a, batch), values(b, batch), rtol=rtol, atol=1e-9)
    for x, y in zip(slopes(a, batch), slopes(b, batch), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-9)


def test_is_the_librarys_dpo():
    """The four-atom program, on sums; and the lift of CPO's."""
    own = build("dpo", beta=0.3)
    for objective in (program("dpo", beta=0.3, probability="sum"), program("cpo", beta=0.3, probability="sum", reference=True)):
        assert objective.needs == frozenset(["reference"])
        same(objective, own)
        rewards, expected = objective(B)[1], own(B)[1]
        for key in ("chosen_reward", "rejected_reward", "margin", "accuracy"):
            torch.testing.assert_close(rewards[key], expected[key])


def test_is_the_librarys_cpo_and_orpo():
    same(program("cpo", beta=0.3, probability="sum", nll_weight=0.7), build("cpo", beta=0.3, c=0.7))
    nll = letters(B)
    orpo = values(build("orpo", lam=1.0), B) + nll.aw  # the pair term alone
    np.testing.assert_allclose(values(program("orpo"), B), orpo, rtol=1e-6)
    same(program("orpo", nll_weight=1.0), build("orpo", lam=1.0))


def test_is_simpo_with_a_reference_set_by_hand():
    """``log rl/rw = -γ/β``."""
    beta, gamma = 2.0, 0.8
    ref = (-np.ones(12) * A.nw, (-1 - gamma / beta) * np.ones(12) * A.nl)
    batch = replace(B, ref_chosen_logps=torch.tensor(ref[0]), ref_rejected_logps=torch.tensor(ref[1]))
    np.testing.assert_allclose(values(program("simpo", beta=beta), batch), softplus(-(beta * (A.aw - A.al) - gamma)), rtol=1e-9)


@pytest.mark.parametrize("formula", ["L -> W", "W", "W and not L", "W or L", "not L", "W xor L"])
def test_is_the_semantic_loss(formula):
    """Without condition and facts: ``-log σ(ρ) = -log Pr(P)``."""
    meaning = {
        "L -> W": 1 - Q * (1 - P), "W": P, "W and not L": P * (1 - Q), "W or L": 1 - (1 - P) * (1 - Q), "not L": 1 - Q,
        "W xor L": P * (1 - Q) + Q * (1 - P),
    }[formula]  # fmt: skip
    np.testing.assert_allclose(values(logic(formula=formula), B), -np.log(meaning), rtol=1e-9)


def test_start_with_a_reference():
    """At the reference ρ is 0."""
    start = replace(B, ref_chosen_logps=B.chosen_logps, ref_rejected_logps=B.rejected_logps)
    for code in enumerate_codes(strict=True):
        np.testing.assert_allclose(values(logic(code=code, reference=True), start), np.log(2), rtol=1e-9)


def test_signs():
    """Strict programs never lower the chosen answer nor raise the rejected one."""
    for code in enumerate_codes(strict=True):
        g_w, g_l = slopes(logic(code=code), B)
        assert (g_w < 0).all(), code
        assert (g_l > 0).all(), code


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends(dtype):
    """p -> 0 and p -> 1: finite, with finite slopes; at the clamp, what 1e-6 gives."""
    edge = of([-1e4, -1e-9, 0.0, -1e4, -0.5], [-1e-9, -1e4, 0.0, -1e4, 0.0], rw=[-1.0] * 5, rl=[-2.0] * 5)
    edge = replace(edge, **{k: v.to(dtype) for k, v in vars(edge).items() if v is not None})
    for code in [*enumerate_codes(), lift("*+-."), lift(".+-.")]:
        for link in ("logistic", "squared", "margin"):
            objective = logic(code=code, link=link)
            assert np.isfinite(values(objective, edge)).all(), code
            assert all(np.isfinite(g).all() for g in slopes(objective, edge)), code
    found = values(logic(formula="not L"), of([-1.0], [0.0]))
    assert found[0] == pytest.approx(-np.log(1e-6), rel=1e-4)


def test_small_probabilities_do_not_cancel():
    """1 - (1 - p) in float32 would be 0."""
    single = of([-20.0], [-21.0])
    single = replace(single, **{k: v.float() for k, v in vars(single).items() if v is not None})
    np.testing.assert_allclose(values(logic(formula="W or L"), single), -np.logaddexp(-20.0, -21.0), rtol=1e-5)


def test_reference_is_ignored_without_need():
    other = ref_randomised(B)
    np.testing.assert_array_equal(values(program("orpo"), B), values(program("orpo"), other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formula": "L -> "}, "unexpected the end"),
        ({"formula": "L -> M"}, "M"),
        ({"code": "+-"}, "no code"),
        ({"formula": "W or not W"}, "nothing satisfies F-"),
        ({"facts": "true"}, "are the same"),
        ({"given": "false"}, "nothing satisfies F\\+"),
        ({"formula": "W", "code": "*+-."}, "not by both"),
        ({"formula": "RL -> W", "reference": True}, "RW and RL already"),
        ({"beta": 0.0}, "beta"),
        ({"link": "cubic"}, "link"),
    ],
    ids=["syntax", "atom", "code", "tautology", "facts", "given", "both", "lift", "beta", "link"],
)
def test_errors(options, message):
    with pytest.raises(UsageError, match=message):
        part.build("objective", {"logic": options})


def test_four_atoms_by_formula():
    assert logic(formula="RW -> W").code == logic(formula="not RW or W", given="true").code
    assert len(logic(formula="RW -> W").code) == 16
