"""The search of the mirror-po study: what is searched is what is written, and it starts near DPO.

Bugs it is meant to catch: curves of the population exchanged, a slope or weight lost on the way into the file, chosen and
rejected places mixed up, β counted twice, runs of another loss read back.
"""

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.batch import Pairs
from metier.parts.objective.mirror_po import write
from metier.studies import mirror_po as study

BENCH = study.Bench(study.Sizes(generations=2, pairs=2, tasks=2, steps=5))


@pytest.mark.parametrize("moving", [False, True])
def test_the_file_is_the_searched_loss(tmp_path, moving):
    size = 53 if moving else 27
    vectors = np.random.default_rng(0).normal(size=(3, size)) * 0.5
    rng = torch.Generator().manual_seed(0)
    policy = -5 * torch.rand(2, 3, 40, generator=rng) - 0.05
    frozen = -5 * torch.rand(2, 1, 40, generator=rng) - 0.05
    found = BENCH.searched(vectors, moving)(tuple(policy), tuple(frozen), 0.3)
    for i in range(3):
        write(tmp_path / "a.json", BENCH.coefficients(vectors[i], moving))
        objective = part.build("objective", {"mirror-po": {"shape": "custom", "coefficients": str(tmp_path / "a.json")}}).obj
        objective.progress = 0.3
        ones = torch.ones(40)
        loss, _ = objective(Pairs(policy[0, i], policy[1, i], ones, ones, frozen[0, 0], frozen[1, 0]))
        torch.testing.assert_close(found[i], loss, rtol=1e-4, atol=1e-4)


def test_the_start_is_nearly_dpo():
    t = study.task(5)
    p = tuple(t.reference.flatten()[None, i] + 0.1 * torch.randn(1, len(i)) for i in (t.chosen, t.rejected))
    r = tuple(t.reference.flatten()[None, i] for i in (t.chosen, t.rejected))
    p = tuple(x.requires_grad_() for x in p)
    slopes = [
        torch.autograd.grad(objective(p, r, 0.0).sum(), p)
        for objective in (BENCH.searched(np.zeros((1, 27)), False), study.dpo([BENCH.beta]))
    ]
    for ours, theirs in zip(*slopes, strict=True):
        cosine = torch.nn.functional.cosine_similarity(ours, theirs).item()
        assert cosine > 0.95


def test_another_loss_has_another_file():
    vector = np.zeros(27)
    first, again = (study.named(BENCH.coefficients(vector, False)) for _ in range(2))
    assert first == again != study.named(BENCH.coefficients(vector + 1e-3, False))


def test_tasks():
    """Labels follow the reward but for flips, and the reference has no part in them."""
    clean, flipped = (study.task(3, flips) for flips in (0.0, 1.0))
    assert torch.equal(clean.chosen, flipped.rejected)
    gaps = torch.cat([(t := study.task(s, 0.0)).reward.flatten()[t.chosen] - t.reward.flatten()[t.rejected] for s in range(20)])
    agreed = (gaps > 0).float()
    assert agreed.mean().item() == pytest.approx(gaps.abs().sigmoid().mean().item(), abs=0.02)
    assert (clean.chosen != clean.rejected).all()
    assert torch.equal(clean.chosen // study.ANSWERS, clean.rejected // study.ANSWERS)


def test_policies_side_by_side_do_not_meet():
    """One of several trained together is the one trained alone, and without steps it is the reference."""
    t = study.task(7)
    together = study.regret(study.dpo([0.1, 1.0]), 2, t, 20)
    assert together[1] == pytest.approx(study.regret(study.dpo([1.0]), 1, t, 20)[0], rel=1e-5)
    start = (t.reward.max(-1).values - (t.reference.exp() * t.reward).sum(-1)).mean().item()
    assert study.regret(study.dpo([0.1]), 1, t, 0)[0] == pytest.approx(start, rel=1e-5)
