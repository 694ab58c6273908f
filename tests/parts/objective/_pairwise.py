"""What tests of pairwise objectives share: pairs in float64, the cards' letters in NumPy, slopes, and trl's own loss.

Letters: ``lw`` and ``ll`` sums of log-probabilities, ``aw`` and ``al`` token means, ``Dw`` and ``Dl`` log-ratios to the reference,
``Rw`` and ``Rl`` their token means, ``h = Dw - Dl``, ``m = lw - ll``.
"""

import contextlib
import json
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from metier.core import part
from metier.core.batch import Pairs, Tokens


def build(name, **options):
    return part.build("objective", {name: options}).obj


def pairs(seed=0, count=6, scale=2.0, samples=0):
    """Pairs of answers of 1 to 7 tokens with every field but the margin, as sums of their tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 8, 2 * count)
    number = int(lengths.sum())
    logps, ref = (torch.tensor(-scale * rng.random(number) - 0.01) for _ in range(2))
    sequence = torch.tensor(np.repeat(np.arange(2 * count), lengths))
    collision = torch.tensor(-2 * rng.random(number))
    tokens = Tokens(logps, torch.ones(number, dtype=torch.float64), sequence, ref, collision=collision)
    sampled = torch.tensor(-10 * rng.random((2, count, samples))) if samples else (None, None)
    length = torch.full((count, samples), 4.0, dtype=torch.float64) if samples else None
    sums, ref_sums = summed(logps, sequence, count), summed(ref, sequence, count)
    n = torch.tensor(lengths).double()
    return Pairs(*sums, n[0::2], n[1::2], *ref_sums, None, sampled[0], length, sampled[1], tokens)


def summed(values, sequence, count):
    s = torch.zeros(2 * count, dtype=values.dtype).index_add(0, sequence, values)
    return s[0::2], s[1::2]


def of(lw, ll, nw=None, nl=None, rw=None, rl=None, **more):
    """Pairs from plain lists."""
    as_tensor = lambda v: None if v is None else torch.tensor(v, dtype=torch.float64)
    ones = [1.0] * len(lw)
    return Pairs(as_tensor(lw), as_tensor(ll), as_tensor(nw or ones), as_tensor(nl or ones), as_tensor(rw), as_tensor(rl), **more)


def at_reference(b):
    """The same pairs with a policy that equals the reference."""
    tokens = None if b.tokens is None else replace(b.tokens, logps=b.tokens.ref_logps)
    return replace(b, chosen_logps=b.ref_chosen_logps, rejected_logps=b.ref_rejected_logps, tokens=tokens)


def ref_randomised(b, seed=9):
    """The same pairs with another reference."""
    rng = torch.Generator().manual_seed(seed)
    new = lambda v: None if v is None else -50 * torch.rand(v.shape, generator=rng, dtype=torch.float64)
    tokens = None if b.tokens is None else replace(b.tokens, ref_logps=new(b.tokens.ref_logps))
    return replace(
        b,
        ref_chosen_logps=new(b.ref_chosen_logps),
        ref_rejected_logps=new(b.ref_rejected_logps),
        ref_sampled_logps=None,
        tokens=tokens,
    )


def loss_of(objective, b):
    result = objective(b)
    return result[0] if isinstance(result, tuple) else result


def values(objective, b):
    return loss_of(objective, b).detach().numpy()


def slopes(objective, b):
    """``(g_w, g_l)`` in NumPy: gradients of the summed loss by both answers' log-probabilities."""
    leaves = [x.detach().clone().requires_grad_() for x in (b.chosen_logps, b.rejected_logps)]
    loss = loss_of(objective, replace(b, chosen_logps=leaves[0], rejected_logps=leaves[1])).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return tuple(np.zeros(len(x)) if g is None else g.numpy() for g, x in zip(found, leaves, strict=True))


def letters(b):
    """The cards' letters as NumPy arrays."""
    lw, ll, nw, nl = (x.detach().numpy() for x in (b.chosen_logps, b.rejected_logps, b.chosen_len, b.rejected_len))
    a = SimpleNamespace(lw=lw, ll=ll, nw=nw, nl=nl, aw=lw / nw, al=ll / nl, m=lw - ll)
    if b.ref_chosen_logps is not None:
        a.Dw, a.Dl = lw - b.ref_chosen_logps.numpy(), ll - b.ref_rejected_logps.numpy()
        a.Rw, a.Rl, a.h = a.Dw / nw, a.Dl / nl, a.Dw - a.Dl
    return a


def sig(x):
    return 1 / (1 + np.exp(-np.asarray(x, dtype=np.float64)))


def softplus(x):
    """``-log σ(-x)``."""
    return np.logaddexp(0.0, x)


def check_moments(name):
    """Running moments are kept as JSON and moved by steps alone: not by evaluation, nor by a step of one pair."""
    objective, resumed, fresh = (build(name) for _ in range(3))
    objective.observe(pairs(1))
    objective.observe(pairs(2))
    kept = json.dumps(objective.state_dict())
    resumed.load_state_dict(json.loads(kept))
    np.testing.assert_array_equal(values(objective, pairs(3)), values(resumed, pairs(3)))
    assert (values(objective, pairs(3)) != values(fresh, pairs(3))).any()
    objective.observe(pairs(4, count=1))
    assert json.dumps(objective.state_dict()) == kept
    objective.observe(pairs(4))
    resumed.observe(pairs(4))
    assert objective.state_dict() == resumed.state_dict() != json.loads(kept)


# --- trl -------------------------------------------------------------------------------------------------------


def trl_dpo(b, loss_type="sigmoid", *, beta=0.1, label_smoothing=0.0, ld_alpha=None, use_weighting=False, **more):
    """The mean loss that ``trl.DPOTrainer._compute_loss`` gives to pairs with tokens, in float64, with its graph."""
    from trl import DPOTrainer

    policy, mask = dense(b, b.tokens.logps)
    reference, _ = dense(b, b.tokens.ref_logps)
    squares, _ = dense(b, b.tokens.collision)
    config = {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "discopop_tau": 0.05, **more}
    trainer = object.__new__(DPOTrainer)
    vars(trainer).update(
        model=torch.nn.Identity().eval(), accelerator=Accelerator(), aux_loss_enabled=False, ld_alpha=ld_alpha,
        precompute_ref_logps=False, ref_model=scorer(reference, squares), loss_types=[loss_type], loss_weights=[1.0], beta=beta,
        label_smoothing=label_smoothing, use_weighting=use_weighting, _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0, args=SimpleNamespace(gradient_checkpointing_kwargs=None, **config), **config,
    )  # fmt: skip
    trainer.model.is_gradient_checkpointing = False
    ids = torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.long)
    answer = torch.cat([torch.zeros(len(mask), 1, dtype=mask.dtype), mask], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": answer}
    return trainer._compute_loss(scorer(policy, squares), inputs, False)


def trl_cpo(chosen, rejected, loss_type="sigmoid", *, beta=0.1, simpo_gamma=0.5, alpha=0.0):
    """The losses ``[B]`` of ``trl``'s ``CPOTrainer.cpo_loss``, without the likelihood term."""
    from trl.experimental.cpo import CPOTrainer

    trainer = object.__new__(CPOTrainer)
    vars(trainer).update(
        accelerator=Accelerator(), loss_type=loss_type, beta=beta, simpo_gamma=simpo_gamma, alpha=alpha, label_smoothing=0.0
    )
    return trainer.cpo_loss(chosen, rejected)[0]


def one_by_one(b):
    """Each pair as a batch of its own."""
    return [picked(b, torch.tensor([i])) for i in range(len(b.chosen_logps))]


def picked(b, order):
    """Pairs in another order, or some of them, with their tokens."""
    flat = {k: v[order] for k, v in vars(b).items() if isinstance(v, torch.Tensor)}
    if b.tokens is None:
        return replace(b, **flat)
    where = torch.cat([torch.nonzero(b.tokens.sequence == 2 * i + s)[:, 0] for i in order.tolist() for s in (0, 1)])
    lengths = torch.stack([b.chosen_len[order], b.rejected_len[order]], 1).flatten().long()
    tokens = {k: v[where] for k, v in vars(b.tokens).items() if isinstance(v, torch.Tensor)}
    tokens["sequence"] = torch.arange(2 * len(order)).repeat_interleave(lengths)
    return replace(b, **flat, tokens=replace(b.tokens, **tokens))


def dense(b, flat):
    """Values per token as ``[2B, T]``, chosen answers first, padded with zeros, and the mask."""
    count = len(b.chosen_logps)
    rows = [flat[b.tokens.sequence == 2 * i + s] for s in (0, 1) for i in range(count)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(r), dtype=torch.long) for r in rows], batch_first=True)
    return padded, mask


def scorer(logps, squares):
    def model(**_):
        nothing = torch.zeros_like(logps)
        return SimpleNamespace(
            log_probs=logps, entropy=nothing, mean_logits=nothing, is_top1=nothing > 0, log_sum_sq_probs=squares
        )

    model.is_gradient_checkpointing = False
    return model


class Accelerator:
    """As much of accelerate as trl's losses ask for, on one process."""

    device = torch.device("cpu")
    gather = gather_for_metrics = staticmethod(lambda x: x)
    autocast = staticmethod(contextlib.nullcontext)


# --- tables ----------------------------------------------------------------------------------------------------


def minimised(loss, start, steps=300):
    """Log-probabilities that minimise ``loss`` of a ``[X, K]`` table of them, by L-BFGS from the logits ``start``."""
    z = start.clone().double().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [z], max_iter=steps, tolerance_grad=1e-12, tolerance_change=1e-15, history_size=30, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(z.log_softmax(-1))
        value.backward()
        return value

    optimizer.step(closure)
    return z.detach().log_softmax(-1)


def total_variation(a, b):
    """Total variation between two rows of log-probabilities, the largest over rows."""
    return float((a.exp() - b.exp()).abs().sum(-1).max()) / 2


def all_pairs(logp, ref=None):
    """Every ordered pair of answers of a ``[X, K]`` table as one-token pairs: ``(Pairs, x, chosen, rejected)``."""
    x, w, r = (i.flatten() for i in torch.meshgrid(*(torch.arange(n) for n in (*logp.shape, logp.shape[1])), indexing="ij"))
    ones = torch.ones(len(x), dtype=torch.float64)
    known = (ref[x, w], ref[x, r]) if ref is not None else (None, None)
    return Pairs(logp[x, w], logp[x, r], ones, ones, *known), x, w, r
