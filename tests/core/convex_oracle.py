"""What tests of the convex bound share: the theorem term by term, and published losses of schedules."""

import numpy as np

PUBLISHED = {  # 124M, 50k steps: final validation loss at lr 5e-4, 1e-3, 2e-3 (arXiv:2501.18965, run logs of the authors)
    0.1: (2.9849, 2.9825, 2.9954), 0.2: (2.9728, 2.9660, 2.9742), 0.4: (2.9659, 2.9548, 2.9579),
    0.6: (2.9670, 2.9529, 2.9513), 0.8: (2.9743, 2.9550, 2.9523), 0.9: (2.9771, 2.9580, 2.9532),
}  # fmt: skip


def theorem(eta, g, d):
    """Theorem 10 of arXiv:2501.18965 for step sizes ``eta``, gradient norms ``g`` and the distance ``d``, without telescoping."""
    eta, g = np.asarray(eta, float), np.broadcast_to(g, np.shape(eta))
    total = d**2 / (2 * eta.sum()) + (eta**2 * g**2).sum() / (2 * eta.sum())
    for k in range(len(eta) - 1):
        total += eta[k] / (2 * eta[k + 1 :].sum()) * (eta[k:] ** 2 * g[k:] ** 2).sum() / eta[k:].sum()
    return total
