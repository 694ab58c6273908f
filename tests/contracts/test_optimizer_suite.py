"""The contract suite finds the mistakes it is there for."""

from dataclasses import dataclass

import pytest
import torch

from metier.core.optim import Rule
from metier.core.part import Beta
from metier.testing import optimizer as suite


@dataclass(frozen=True, kw_only=True)
class Good(Rule):
    elementwise = True
    default_lr = 0.1

    beta: Beta = 0.9

    def init(self, p):
        return {"m": torch.zeros_like(p)}

    def update(self, g, p, state, step):
        return state["m"].lerp_(g, 1 - self.beta)


class ScalesTheGradient(Good):
    def update(self, g, p, state, step):
        return g.mul_(0.5)


class KeepsTheParameter(Good):
    def init(self, p):
        return {"m": torch.zeros_like(p), "start": p.detach()}


class FusedOtherwise(Good):
    def apply(self, params, grads, states, step):
        for p, g in zip(params, grads, strict=True):
            p.sub_(g, alpha=step.lr)


class Ascends(Good):
    def update(self, g, p, state, step):
        return -g


class CountsInPython(Good):
    def update(self, g, p, state, step):
        CALLS.append(1)
        return g * len(CALLS)


class OnlyMatrices(Good):
    def update(self, g, p, state, step):
        return g @ g.transpose(-2, -1) @ g


class LowPrecision(Good):
    def update(self, g, p, state, step):
        return (g.bfloat16() * 0.3).to(g.dtype) + p.bfloat16().to(p.dtype) * 0.1 * (p.shape != ())

    def init(self, p):
        return {"m": torch.zeros_like(p, dtype=torch.bfloat16)}


CALLS: list[int] = []


@pytest.mark.parametrize(
    ("check", "rule"),
    [
        ("_aliasing", ScalesTheGradient),
        ("_aliasing", KeepsTheParameter),
        ("_fused_is_plain", FusedOtherwise),
        ("_descends", Ascends),
        ("_resume", CountsInPython),
        ("_shapes", OnlyMatrices),
        ("_low_precision", LowPrecision),
    ],
)
def test_a_bad_rule_is_caught(check, rule):
    getattr(suite, check)("optimizer/bad", Good())
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        getattr(suite, check)("optimizer/bad", rule())


def test_values_outside_a_range():
    assert suite._outside(Beta) == [-1, 1, 2]
    assert suite._outside(Beta | None) == [-1, 1, 2]
    assert suite._outside(bool) == []
