"""How far a policy is from its reference on answers that it sampled: two estimates of ``KL(π ‖ π_ref)``.

    answer_stats(policy, reference, prompts, answers, pad_id=…) -> {"logps", "ref_logps", "kl_mc", "kl", "length"}

For an answer y drawn from π, ``E[log π(y|x) - log π_ref(y|x)] = KL``. The log-ratio itself is the Monte-Carlo estimate. Replacing
the log-ratio of each token by its expectation given the prefix, ``Σ_t KL(π(·|y_<t) ‖ π_ref(·|y_<t))``, is the Rao-Blackwellised
one: the same mean, and the noise of the token drawn is gone.
"""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metier.core import models
from metier.core.data.collate import collate
from metier.core.data.encode import Item
from metier.core.layout import Layout
from metier.core.scores import CHUNK_BYTES, evaluating, target_states

Reference = nn.Module | Callable[[], AbstractContextManager]
"""A frozen model, or ``disabled()`` under which the policy is its own reference (an adapter switched off)."""
BATCH_TOKENS = 16384


@torch.no_grad()
def answer_stats(
    policy: Any, reference: Reference, prompts: Sequence[np.ndarray], answers: Sequence[Sequence[Any]], pad_id: int,
    *, batch_tokens: int = BATCH_TOKENS, chunk_bytes: int = CHUNK_BYTES,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Statistics ``[P, K]`` of K answers to each of P prompts; float64.

    ``answers[i][k]`` are token ids, the end token included, or an object with ``ids``. Keys: ``logps`` and ``ref_logps`` summed
    over the tokens, ``kl_mc`` their difference, ``kl`` the per-position full-vocabulary KL summed over the answer's
    prefixes (Rao-Blackwellised when the answers were sampled from the policy at temperature 1), ``length`` in tokens.
    Logits exist for chunks of positions only. Dropout is off meanwhile.

    Raises ``ValueError`` when prompts have different numbers of answers, or a prompt is empty.
    """
    ids = [[np.asarray(getattr(a, "ids", a), np.int32) for a in row] for row in answers]
    number = len(ids[0]) if ids else 0
    if len(ids) != len(prompts) or any(len(row) != number for row in ids):
        raise ValueError("every prompt needs the same number of answers")
    if any(len(p) == 0 for p in prompts):
        raise ValueError("an empty prompt predicts no first token")
    items = [
        Item(np.asarray(p, np.int32), np.zeros(len(p), bool), tuple(row), tuple(np.ones(len(a), bool) for a in row), str(i))
        for i, (p, row) in enumerate(zip(prompts, ids, strict=True))
    ]
    out = {k: np.zeros((len(items), number)) for k in ("logps", "ref_logps", "kl")}
    order = sorted(range(len(items)), key=lambda i: items[i].length)
    with evaluating(policy), evaluating(reference) if isinstance(reference, nn.Module) else contextlib.nullcontext():
        for batch in _batches(order, items, batch_tokens):
            layout = collate([items[i] for i in batch], pad_id=pad_id).to(next(policy.parameters()).device)
            for name, sums in _sums(policy, reference, layout, chunk_bytes).items():
                out[name][batch] = sums.reshape(len(batch), number).cpu().numpy()
    out["kl_mc"] = out["logps"] - out["ref_logps"]
    out["length"] = np.array([[len(a) for a in row] for row in ids], float).reshape(len(items), number)
    return out


def _batches(order: Sequence[int], items: Sequence[Item], batch_tokens: int) -> list[list[int]]:
    found: list[list[int]] = []
    for i in order:  # by rising length: the newest is the widest
        if found and (len(found[-1]) + 1) * items[i].length <= batch_tokens:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def _sums(policy: Any, reference: Reference, layout: Layout, chunk_bytes: int) -> dict[str, Tensor]:
    """Sums ``[S]`` over the targets of each answer, in float64 where the device has it."""
    other = reference if isinstance(reference, nn.Module) else policy
    switched = contextlib.nullcontext if isinstance(reference, nn.Module) else reference
    h = target_states(policy, layout)
    with switched():
        h_ref = target_states(other, layout)
    rows = max(1, chunk_bytes // (8 * policy.config.vocab_size))
    exact = torch.float32 if h.device.type == "mps" else torch.float64
    sums = {k: torch.zeros(sum(layout.answers), dtype=exact, device=h.device) for k in ("logps", "ref_logps", "kl")}
    for begin in range(0, h.shape[0], rows):
        part = slice(begin, begin + rows)
        logp = _log_softmax(policy, h[part])
        with switched():
            ref = _log_softmax(other, h_ref[part])
        target, sequence = layout.target[part, None], layout.sequence[part]
        values = {
            "logps": logp.gather(1, target)[:, 0], "ref_logps": ref.gather(1, target)[:, 0],
            "kl": (logp.exp() * (logp - ref)).sum(1),
        }  # fmt: skip
        for name, value in values.items():
            sums[name].index_add_(0, sequence, value.to(exact))
    return sums


def _log_softmax(model: Any, h: Tensor) -> Tensor:
    """``[n, V]`` in float32 (float64 stays)."""
    z = models.head(model)(h)
    z = z if z.dtype == torch.float64 else z.float()
    transform = models.logit_transform(model)
    return (transform(z) if transform else z).log_softmax(1)
