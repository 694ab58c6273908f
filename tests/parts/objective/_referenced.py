"""What the tests of losses with a reference share: a grid of scores, formulas checked with their gradients, and trl."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.batch import Pairs


def build(name, **options):
    """The objective as a function of a batch."""
    return part.build("objective", {name: options}).obj


def value(name, batch, **options):
    """The losses ``[B]`` of an objective."""
    result = build(name, **options)(batch)
    return result[0] if isinstance(result, tuple) else result


def pairs(chosen, rejected, ref_chosen=None, ref_rejected=None, lengths=(4.0, 7.0), margin=None):
    """A float64 batch; without reference scores the policy's own."""
    lw, ll = _float(chosen), _float(rejected)
    rw, rl = (lw if ref_chosen is None else _float(ref_chosen)), (ll if ref_rejected is None else _float(ref_rejected))
    nw, nl = (_float(n).expand_as(lw).clone() for n in lengths)
    return Pairs(lw, ll, nw, nl, rw, rl, None if margin is None else _float(margin))


def _float(v):
    return torch.as_tensor(v, dtype=torch.float64)


def random_pairs(size=16, scale=4.0, seed=0, **fields):
    """Answers of different lengths with log-ratios of about ``scale`` nats, on both sides of 0."""
    rng = np.random.default_rng(seed)
    nw, nl = rng.integers(1, 12, size), rng.integers(1, 12, size)
    rw, rl = -nw * rng.uniform(0.5, 3, size), -nl * rng.uniform(0.5, 3, size)
    lw, ll = rw + scale * rng.normal(size=size), rl + scale * rng.normal(size=size)
    made = pairs(np.minimum(lw, -1e-3), np.minimum(ll, -1e-3), rw, rl, (nw, nl), rng.uniform(0.1, 3, size))
    return replace(made, **fields)


def at_init(**fields):
    """Policy equal to reference."""
    return replace(random_pairs(scale=0.0), **fields)


def single(b):
    """The batch in float32."""
    return replace(b, **{k: v.float() for k, v in vars(b).items() if isinstance(v, torch.Tensor)})


def slopes(name, batch, **options):
    """Gradients of the summed loss in the two log-probabilities, ``[B]`` each."""
    w, l = (v.detach().clone().requires_grad_() for v in (batch.chosen_logps, batch.rejected_logps))  # noqa: E741
    value(name, replace(batch, chosen_logps=w, rejected_logps=l), **options).sum().backward()
    return tuple(np.zeros(len(v)) if v.grad is None else v.grad.numpy() for v in (w, l))


def sig(z):
    """Logistic function in float64."""
    return np.exp(-np.logaddexp(0, -z))


def nls(z):
    """``-log σ(z)``."""
    return np.logaddexp(0, -z)


def numbers(b):
    """The batch as float64 numpy under the names of the formulas."""
    x = SimpleNamespace(
        lw=b.chosen_logps.numpy(), ll=b.rejected_logps.numpy(), nw=b.chosen_len.numpy(), nl=b.rejected_len.numpy(),
        rw=b.ref_chosen_logps.numpy(), rl=b.ref_rejected_logps.numpy(), gap=b.margin.numpy(),
    )  # fmt: skip
    x.dw, x.dl = x.lw - x.rw, x.ll - x.rl
    x.h = x.dw - x.dl
    return x


def check_formula(name, loss, gradients, batch=None, **options):
    """Loss and both gradients against ``loss(x)`` and ``gradients(x) -> (g_w, g_l)`` in float64 numpy."""
    for b in [batch] if batch is not None else [random_pairs(), random_pairs(scale=60.0, seed=1), at_init()]:
        x = numbers(b)
        np.testing.assert_allclose(value(name, b, **options).numpy(), loss(x), rtol=1e-9, atol=1e-12)
        for found, expected in zip(slopes(name, b, **options), gradients(x), strict=True):
            np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-8, atol=1e-12)


# --- trl -----------------------------------------------------------------------------------------------------


def by_trl(loss_type, b, *, beta=0.1, label_smoothing=0.0, divergence="reverse_kl", coef=1.0, tau=0.05):
    """Mean loss of trl's ``DPOTrainer`` and its gradients in the two log-probabilities, on the scores of a batch.

    Each answer's log-probability is spread evenly over its tokens. trl counts lengths on the mask as it is before the shift,
    so the first column is a prompt token.
    """
    trl = pytest.importorskip("trl")
    size, n = len(b.chosen_logps), torch.cat([b.chosen_len, b.rejected_len])
    inside = torch.arange(int(n.max())).unsqueeze(0) < n.unsqueeze(1)
    sums = torch.cat([b.chosen_logps, b.rejected_logps]).detach().clone().requires_grad_()
    ref = torch.cat([b.ref_chosen_logps, b.ref_rejected_logps])
    mask = torch.cat([torch.zeros(2 * size, 1, dtype=torch.long), inside.long()], 1)
    scores = SimpleNamespace(
        log_probs=(sums / n).unsqueeze(1) * inside, entropy=inside.double(), mean_logits=inside.double(), is_top1=inside,
    )  # fmt: skip
    same = SimpleNamespace(gather=_itself, gather_for_metrics=_itself, device=torch.device("cpu"))
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=same, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type=divergence, f_alpha_divergence_coef=coef, loss_types=[loss_type],
        loss_weights=[1.0], beta=beta, label_smoothing=label_smoothing, use_weighting=False, _metrics={"train": defaultdict(list)},
        _total_train_tokens=0, _tp_size=1, args=SimpleNamespace(discopop_tau=tau),
    )  # fmt: skip
    inputs = {
        "completion_mask": mask, "input_ids": mask, "attention_mask": mask,
        "ref_chosen_logps": ref[:size], "ref_rejected_logps": ref[size:],
    }  # fmt: skip
    loss = trl.DPOTrainer._compute_loss(trainer, _Scored(scores), inputs, False)
    loss.backward()
    return loss.item(), sums.grad[:size].numpy(), sums.grad[size:].numpy()


class _Scored:
    """A model that has already been run."""

    def __init__(self, scores):
        self.scores = scores

    def __call__(self, **_):
        return self.scores


def _itself(x):
    return x


def check_like_trl(name, loss_type, batch=None, options=None, **settings):
    """Mean loss and per-pair gradients of an objective against trl's, to 1e-5."""
    b = single(random_pairs() if batch is None else batch)
    loss, *expected = by_trl(loss_type, b, **settings)
    options = {} if options is None else options
    np.testing.assert_allclose(value(name, b, **options).mean().item(), loss, rtol=1e-5)
    for found, g in zip(slopes(name, b, **options), expected, strict=True):
        np.testing.assert_allclose(found / len(found), g, rtol=1e-5, atol=1e-8)
