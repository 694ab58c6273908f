"""What tests of objectives on lists share: three lists of four answers in float64, and an objective's losses on lists."""

import numpy as np
import torch

from metier.core import part
from metier.core.batch import Lists


def drawn(seed):
    """Log-probabilities, those of the reference, and scores, ``[3, 4]`` each."""
    rng = np.random.default_rng(seed)
    return -30 * rng.random((3, 4)), -30 * rng.random((3, 4)), rng.standard_normal((3, 4))


def scored(name, logps, score, ref=None, length=5.0, **options):
    """Losses ``[B]``, gradients of their sum ``[B, K]`` and metrics of an objective on whole lists."""
    shape = np.shape(logps)
    logps, score, length = (torch.tensor(np.broadcast_to(v, shape).astype(float)) for v in (logps, score, length))
    known = None if ref is None else torch.tensor(np.array(ref, dtype=float))
    batch = Lists(logps.requires_grad_(), length, score, torch.ones(shape, dtype=torch.bool), known)
    loss, metrics = part.build("objective", {name: options}).obj(batch)
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    return loss.detach().numpy(), slope.numpy(), metrics


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
