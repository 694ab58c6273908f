"""Probing: what a probe sees is what an evaluation sees, and nothing is left changed."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metier.core import part, probing
from metier.core.batch import Tokens
from metier.core.errors import UsageError
from metier.testing._tiny import layouts, tiny
from metier.testing.probe import tiny_probe


def test_undisturbed_puts_everything_back():
    probe = tiny_probe()
    probe.model.train()
    next(iter(probe.model.children())).eval()
    probe.model.model.norm.weight.grad = torch.ones(16)
    modes, grads = [m.training for m in probe.model.modules()], [p.grad for p in probe.model.parameters()]
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    with probing.undisturbed(probe):
        assert not any(m.training for m in probe.model.modules())
        torch.rand(3), random.random(), np.random.rand()
    assert [m.training for m in probe.model.modules()] == modes
    assert all(a is b for a, b in zip(grads, (p.grad for p in probe.model.parameters()), strict=True))
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


def test_gradient_is_the_loops():
    """Of the mean loss, as backward gives it, and not left behind."""
    probe = tiny_probe(1)
    got = probe.gradient(probe.layouts[0])
    assert all(p.grad is None for p in probe.model.parameters())
    total, units, _ = probe.module(probe.layouts[0])
    (total / units).backward()
    for name, p in probe.model.named_parameters():
        torch.testing.assert_close(got[name], p.grad)


def test_scores_and_loss_agree():
    probe = tiny_probe(1)
    scored = probe.score(probe.layouts[0], reads=Tokens, needs=("logits",))
    total, units = probe.loss(probe.layouts[0])
    assert total == pytest.approx(-float(scored.logps.sum()), rel=1e-5)
    assert units == len(scored.targets)
    assert not scored.logps.requires_grad


def session(held_out, *listeners):
    run = tiny(*listeners)
    steps = [SimpleNamespace(micro=layouts(2, seed=i)) for i in range(5)]
    return SimpleNamespace(context=run.context, eval_layouts=held_out, loader=steps, listeners=list(listeners)), run


def test_which_layouts():
    held = layouts(3)
    both, _ = session(held)
    assert list(probing.probe_session(both).layouts) == held
    assert list(probing.probe_session(both, batches=2).layouts) == held[:2]
    assert len(probing.probe_session(both, on="train", batches=5).layouts) == 5
    none, _ = session([])
    assert len(probing.probe_session(none).layouts) == 2  # one step
    with pytest.raises(UsageError, match="held-out"):
        probing.probe_session(none, on="eval")


def test_averaged_weights_are_what_is_measured():
    hook = part.build("hook", {"ema": {"decay": 0.5}}).obj
    made, run = session([], hook)
    run.dispatch("on_start", run.context)
    run.step()
    live = run.context.model.model.norm.weight.detach().clone()
    with probing.as_evaluated(made):
        seen = run.context.model.model.norm.weight.detach().clone()
    assert torch.equal(seen, hook.average["model.norm.weight"])
    assert not torch.equal(seen, live)
    assert torch.equal(run.context.model.model.norm.weight, live)
