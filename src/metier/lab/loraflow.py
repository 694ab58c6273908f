"""Low-rank adapters on a factorised matrix: gradient flow of ``½ ‖Y - (W₂ + B₂A₂)(W₁ + B₁A₁)‖²`` in small (arXiv:2503.06982).

Shapes: S problems side by side, each ``n`` by ``n``; ``B [S, n, r]``, ``A [S, r, n]``.
"""

import math
from collections.abc import Iterator

import numpy as np

N = 20
"""Size of all matrices."""
STEP = 5e-3
"""Of Euler's method."""


def problems(rank: int, angle: float | None = None, seeds: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``W₂, W₁, Y [S, n, n]``: W₂W₁ balanced, with singular values in [0.5, 1.5]; Y is a shift of norm 1 away from it.

    The shift has random directions, or W₂W₁'s top ones turned by ``angle`` degrees towards others.
    """
    made = []
    for seed in range(seeds):
        g = np.random.default_rng(seed)
        u, v, q = (np.linalg.qr(g.normal(size=(N, N)))[0] for _ in range(3))
        s = np.sort(g.uniform(0.5, 1.5, N))[::-1]
        c, d = (0.0, 1.0) if angle is None else (math.cos(math.radians(angle)), math.sin(math.radians(angle)))
        free = [np.linalg.qr(g.normal(size=(N, rank)))[0] for _ in range(2)]
        if angle is not None:
            free = [np.linalg.qr(f - x[:, :rank] @ (x[:, :rank].T @ f))[0] for f, x in zip(free, (u, v), strict=True)]
        left, right = (c * x[:, :rank] + d * f for x, f in zip((u, v), free, strict=True))
        w2, w1 = (u * np.sqrt(s)) @ q.T, (q * np.sqrt(s)) @ v.T
        made.append((w2, w1, w2 @ w1 + left @ right.T / math.sqrt(rank)))
    w2, w1, y = (np.stack(m) for m in zip(*made, strict=True))
    return w2, w1, y


def starts(w2: np.ndarray, w1: np.ndarray, y: np.ndarray, alpha: float, rank: int, spectral: bool) -> list[np.ndarray]:
    """``B₁, A₁, B₂, A₂``: the top singular vectors of ``W₂ᵀE₀`` and ``E₀W₁ᵀ`` times α, or normal numbers of that length."""
    e, g, out = y - w2 @ w1, np.random.default_rng(100), []
    for target in (w2.mT @ e, e @ w1.mT):
        if spectral:
            u, _, vt = np.linalg.svd(target)
            out += [alpha * u[..., :rank], alpha * vt[:, :rank]]
        else:
            out += [alpha / math.sqrt(N) * g.normal(size=s) for s in ((len(y), N, rank), (len(y), rank, N))]
    return out


def flow(
    w2: np.ndarray, w1: np.ndarray, y: np.ndarray, factors: list[np.ndarray], length: float
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Losses ``[S]`` and factors at the times 0, STEP, … before ``length``."""
    for _ in range(round(length / STEP)):
        b1, a1, b2, a2 = factors
        left, right = w2 + b2 @ a2, w1 + b1 @ a1
        e = y - left @ right
        yield 0.5 * np.square(e).sum((1, 2)), factors
        g1, g2 = left.mT @ e, e @ right.mT
        change = (g1 @ a1.mT, b1.mT @ g1, g2 @ a2.mT, b2.mT @ g2)
        factors = [f + STEP * d for f, d in zip(factors, change, strict=True)]


def halving(alpha: float, length: float) -> dict[str, float]:
    """Mean time until the loss is halved, largest misalignment ``1 - |⟨u₁, B₁⟩| / |B₁|`` when ``|B₁|`` reaches 0.1, and σ₁."""
    w2, w1, y = problems(1)
    e = y - w2 @ w1
    both = [np.linalg.norm(t, ord=2, axis=(1, 2)) for t in (w2.mT @ e, e @ w1.mT)]
    top, goal, out = (
        np.linalg.svd(w2.mT @ e)[0][..., 0],
        0.25 * np.square(e).sum((1, 2)),
        {"sigma": float(np.maximum(*both).mean())},
    )
    for name in ("random", "spectral"):
        time, off = np.full((2, len(y)), np.nan)
        for k, (loss, (b1, *_)) in enumerate(flow(w2, w1, y, starts(w2, w1, y, alpha, 1, name == "spectral"), length)):
            time = np.where(np.isnan(time) & (loss <= goal), k * STEP, time)
            size = np.linalg.norm(b1[..., 0], axis=1)
            now = 1 - np.abs((top * b1[..., 0]).sum(1)) / size
            off = np.where(np.isnan(off) & (size >= 0.1 * (1 - 1e-9)), now, off)
        out |= {name: float(np.nan_to_num(time, nan=length).mean()), f"{name} off": float(np.nanmax([*off, 0.0]))}
    return out
