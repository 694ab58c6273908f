"""Oracle of core/quantize: nearest levels by brute force in float64 numpy, the surrogate staircase by numerical integration
and differences, and the figures in the unit tests of Azure/MS-AMP (tests/operators/test_fp4_quantize.py, commit 9746ea85289f).

Bugs it is meant to catch: ties to even or away from zero, rounding x + 0.5, a scale of the wrong dimension or rounded to
bfloat16, a power of two off by one near a boundary, f' of the unscaled value, no cap, an interval of the wrong length, outliers
on one side only or one too few, gradients stopped by the clamp, values that are not finite hidden.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch

from metier.core import quantize as q

LEVELS = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
POINTS = (LEVELS[1:] + LEVELS[:-1]) / 2
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def nearest(x):
    """The level at the smallest distance; of two, the upper."""
    distance = np.abs(x[..., None] - LEVELS)
    return LEVELS[len(LEVELS) - 1 - np.argmin(distance[..., ::-1], axis=-1)]


def expected(x, axis):
    """``q(x)`` in float64."""
    largest = np.abs(x).max(axis=axis, keepdims=True)
    s = np.where(largest > 0, 6 / np.where(largest > 0, largest, 1), 1)
    return nearest(x * s) / s


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- rounding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_level_with_ties_up(dtype):
    """All levels, all decision points, and the numbers of the type just beside them."""
    at = torch.tensor([*POINTS, *LEVELS], dtype=dtype)
    beside = [torch.nextafter(at, torch.tensor(end, dtype=dtype)) for end in (-np.inf, np.inf)] if dtype != torch.float16 else []
    x = torch.cat([at, *beside, random(5000, dtype=dtype) * 3])
    got = q.round_e2m1(x)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.double().numpy(), nearest(x.double().numpy().clip(-6, 6)))
    np.testing.assert_array_equal(q.round_e2m1(torch.from_numpy(POINTS)).numpy(), LEVELS[1:])


def test_levels_stay_and_signs_mirror():
    """Identity (1) of the card: idempotent, odd except at ties, levels map to themselves."""
    levels = torch.from_numpy(LEVELS)
    assert torch.equal(q.round_e2m1(levels), levels)
    x = random(1000) * 3
    assert torch.equal(q.round_e2m1(-x), -q.round_e2m1(x))
    assert torch.equal(q.round_e2m1(torch.tensor([-0.25, 0.25])), torch.tensor([0.0, 0.5]))
    for dim in (None, 0, 1):
        for power in (False, True):
            once = q.quantize(random(40, 30), dim, power)
            torch.testing.assert_close(q.quantize(once, dim, power), once, rtol=1e-14, atol=0)


def test_beyond_the_largest():
    assert q.round_e2m1(torch.tensor([7.0, -80.0, float("inf")])).tolist() == [6, -6, 6]


# --- scales ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_values_against_numpy(dim):
    x = random(23, 57)
    x[3] = 0
    np.testing.assert_allclose(q.quantize(x, dim).numpy(), expected(x.numpy(), dim), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_round_once_at_the_end(dtype):
    x = random(64, 48, dtype=dtype)
    got, want = q.quantize(x, -1), expected(x.float().numpy().astype(np.float32), -1)
    assert got.dtype == dtype
    assert torch.equal(got, torch.from_numpy(want.astype(np.float32)).to(dtype))


def test_scale_invariance():
    """Identity (6) of the card: q(c x) = c q(x)."""
    x = random(20, 30)
    for c in (1e-20, 0.37, 5.0, 1e12):
        torch.testing.assert_close(q.quantize(c * x, 1), c * q.quantize(x, 1), rtol=1e-13, atol=0)
    assert torch.equal(q.quantize(8 * x, 1, True), 8 * q.quantize(x, 1, True))


def test_power_of_two_scales():
    at = torch.tensor([6.0, 3.0, 12.0, 6 * 2.0**20, 6 / 2.0**20, 6 / 2.0**100])
    above, below = (torch.nextafter(at, torch.tensor(end)) for end in (np.inf, 0.0))  # a logarithm rounds these to the integer
    largest = torch.cat([at, above, below, torch.tensor([1.0, 1e-30, 1e30])])
    want = [2.0 ** (int(np.frexp(np.float32(6) / np.float32(v))[1]) - 1) for v in largest.numpy()]
    assert want[:6] == [1, 2, 0.5, 2.0**-20, 2.0**20, 2.0**100]
    assert want[6:12] == [w / 2 for w in want[:6]]
    got = q.absmax_scale(torch.stack([largest, -largest / 2], 1), 1, True)
    assert got.flatten().tolist() == want


def test_zeros_and_the_smallest():
    tiny = torch.finfo(torch.float32).tiny
    x = torch.tensor([[0.0, 0.0], [tiny, -tiny / 2], [tiny / 1024, 0.0], [tiny * 2, tiny]])
    for power in (False, True):
        got = q.quantize(x, 1, power)
        assert torch.isfinite(got).all()
        assert torch.equal(got[0], x[0])
        torch.testing.assert_close(got[3], x[3], rtol=1e-6, atol=0)
    assert q.absmax_scale(x, 1).flatten()[0] == 1
    assert q.quantize(torch.zeros(0, 4), None).shape == (0, 4)
    assert q.quantize_clamped(torch.zeros(0, 4), -1, alpha=0.9, alpha_dim=None, compensate=True).shape == (0, 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(bad):
    x = random(3, 8)
    x[1, 2] = bad
    for got in (q.quantize(x, 1), q.quantize(x, 1, True), q.quantize_clamped(x, 1, alpha=1.0, alpha_dim=1, compensate=True)):
        assert got[1].isnan().all()
        assert got[[0, 2]].isfinite().all()
    nan = q.quantize_clamped(torch.where(x.isinf(), torch.nan, x), 1, alpha=0.8, alpha_dim=1, compensate=False)
    assert nan[1].isnan().any()


# --- outliers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.999, 0.99, 0.97, 0.9])
@pytest.mark.parametrize("n", [16, 64, 100, 176, 1000])
def test_thresholds_by_sorting(alpha, n):
    """And identity (5) of the card: a fraction 2 (1 - alpha) +- 1/n is clamped."""
    x = random(7, n, seed=n)
    x[:, 3] *= 20
    m = round((1 - alpha) * n)
    ordered = np.sort(x.numpy(), axis=1)
    want = np.clip(x.numpy(), ordered[:, m : m + 1], ordered[:, n - 1 - m : n - m])
    got = q.clamp_outliers(x, alpha, -1)
    np.testing.assert_array_equal(got.numpy(), want)
    moved = (got != x).sum(1) / n
    assert ((moved - 2 * (1 - alpha)).abs() <= 1 / n + 1e-12).all()
    flat = q.clamp_outliers(x, alpha, None)
    np.testing.assert_array_equal(flat.flatten().numpy(), q.clamp_outliers(x.flatten(), alpha, 0).numpy())
    assert abs(float((flat != x).sum()) / x.numel() - 2 * (1 - alpha)) <= 1 / x.numel() + 1e-12


def test_alpha_one_disables_it_and_small_groups_survive():
    x = random(4, 9)
    assert torch.equal(q.clamp_outliers(x, 1.0, -1), x)
    for n in (1, 2, 3):
        assert q.clamp_outliers(x[:, :n], 0.51, -1).isfinite().all()
    assert torch.equal(q.clamp_outliers(x[:, :2], 0.51, -1), x[:, :2])


def test_compensation_leaves_only_the_rounding_error(monkeypatch):
    """Identity (4) of the card: with the identity in place of rounding nothing changes."""
    x = random(5, 200)
    c = q.clamp_outliers(x, 0.97, -1)
    for compensate in (True, False):
        got = q.quantize_clamped(x, -1, alpha=0.97, alpha_dim=-1, compensate=compensate)
        want = expected(c.numpy(), -1) + compensate * (x - c).numpy()
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-13, atol=1e-15)
    monkeypatch.setattr(q, "quantize", lambda x, dim, power_of_two=False: x)
    torch.testing.assert_close(q.quantize_clamped(x, -1, alpha=0.97, alpha_dim=-1, compensate=True), x, rtol=1e-15, atol=1e-15)


# --- the slope of the staircase ----------------------------------------------------------------------------------


def test_slope_figures_of_the_card():
    """Identity (2): values for k = 5, never above the cap."""
    x = torch.tensor([-6, -5.368, -4.737, 0.316, 0.947], dtype=torch.float64)
    np.testing.assert_allclose(q.staircase_slope(x, 5, 3.0).numpy(), [0.200, 0.445, 0.582, 0.580, 0.242], atol=5e-4)
    grid = torch.cat([torch.linspace(-6, 6, 10001, dtype=torch.float64), torch.from_numpy(POINTS)])
    slope = q.staircase_slope(grid, 5, 3.0)
    assert slope.max() == 3.0
    assert slope.min() == pytest.approx(0.2)
    assert (slope[-len(POINTS) :] == 3.0).all()
    np.testing.assert_allclose(q.staircase_slope(torch.from_numpy(LEVELS), 5, 3.0).numpy(), 0.2)


def test_slope_is_the_derivative_of_the_staircase():
    """Against differences of f(z) = l + d/2 (1 + sign(2z/d - 1) |2z/d - 1|^(1/k)) in numpy."""

    def f(x, k):
        i = np.clip(np.searchsorted(LEVELS, x, side="right") - 1, 0, len(LEVELS) - 2)
        low, d = LEVELS[i], LEVELS[i + 1] - LEVELS[i]
        t = 2 * (x - low) / d - 1
        return low + d / 2 * (1 + np.sign(t) * np.abs(t) ** (1 / k))

    x = np.random.default_rng(0).uniform(-6, 6, 4000)
    x = x[np.abs(x[:, None] - np.concatenate([POINTS, LEVELS])).min(1) > 0.01]
    for k in (2.0, 3.0, 5.0, 10.0):
        want = (f(x + 1e-6, k) - f(x - 1e-6, k)) / 2e-6
        np.testing.assert_allclose(q.staircase_slope(torch.from_numpy(x), k, 1e9).numpy(), want, rtol=1e-5)


def test_slope_integrates_to_each_interval_without_a_cap():
    k, start = 5, 0.02
    u = start + (1 - start) * (np.arange(4000) + 0.5) / 4000
    for low, high in pairwise(LEVELS):
        # With |2z/d - 1| = u^k the integrand f'(x) dx/du is the constant d/2: the part below the start is known.
        d, total = high - low, 0.0
        for sign in (-1, 1):
            x = torch.from_numpy((low + high) / 2 + sign * d / 2 * u**k)
            inside = q.staircase_slope(x, k, np.inf).numpy() * d / 2 * k * u ** (k - 1)
            total += inside.mean() * (1 - start) + start * d / 2
        assert total == pytest.approx(d, rel=1e-6)


def test_k_one_is_straight_through():
    """Identity (3) of the card."""
    x = torch.cat([random(1000) * 3, torch.from_numpy(POINTS)])
    assert torch.equal(q.staircase_slope(x, 1.0, 3.0), torch.ones_like(x))


# --- gradients ---------------------------------------------------------------------------------------------------


def test_gradient_passes_or_takes_the_slope():
    x, up = random(6, 50).requires_grad_(), random(6, 50, seed=1)
    clamped = q.pass_through(x, lambda x: q.quantize_clamped(x, -1, alpha=0.9, alpha_dim=-1, compensate=False))
    (g,) = torch.autograd.grad((clamped * up).sum(), x)
    assert torch.equal(g, up)
    y = q.pass_through(x, lambda x: q.quantize(x, 1), lambda x: q.staircase_slope(x * q.absmax_scale(x, 1), 5, 3.0))
    (g,) = torch.autograd.grad((y * up).sum(), x)
    s = 6 / x.detach().abs().amax(1, keepdim=True)
    torch.testing.assert_close(g, up * q.staircase_slope(x.detach() * s, 5, 3.0), rtol=1e-14, atol=0)
    torch.testing.assert_close(y.detach(), q.quantize(x.detach(), 1), rtol=0, atol=0)


def test_gradients_of_single_examples():
    """``torch.func`` sees through it."""

    def loss(x):
        return (q.pass_through(x, lambda x: q.quantize(x, -1)) ** 2).sum()

    x = random(4, 3, 10)
    got = torch.func.vmap(torch.func.grad(loss))(x)
    torch.testing.assert_close(got, 2 * q.quantize(x, -1))


# --- parity ------------------------------------------------------------------------------------------------------


def test_slope_figures_of_ms_amp():
    want = [0.2002, 0.4375, 0.6055, 0.2168, 1.8359, 0.2695, 0.3027, 0.2695, 0.2402, 0.5781]
    x = torch.linspace(-6.0, 6.0, 20).bfloat16()
    got = q.staircase_slope(x.float(), 5.0, 3.0).bfloat16()
    assert torch.equal(got, torch.tensor([*want, *want[::-1]], dtype=torch.bfloat16))


def test_quantised_figures_of_ms_amp():
    """Power-of-two scales of the tensor, of its last dimension (their channel_wise), and of the transposed."""
    x = torch.tensor([[0.001, 0.048, 0.0997], [0.1503, 0.2002, 0.2497], [0.2974, 0.30699, 0.4001]]).bfloat16()
    want = torch.tensor([[0.0, 0.0625, 0.125], [0.125, 0.1875, 0.25], [0.25, 0.25, 0.375]]).bfloat16()
    assert torch.equal(q.quantize(x, None, True), want)
    x = torch.tensor([[-0.01, 0.48, -9.67], [1.623, -2.222, 24.67], [-2.874, 3.699, -34.57], [0.85, -1.343, 18.88]]).bfloat16()
    want = torch.tensor([[0.0, 0.5, -8.0], [1.5, -2.0, 24.0], [-3.0, 4.0, -32.0], [0.75, -1.5, 16.0]]).bfloat16()
    assert torch.equal(q.quantize(x, 0, True), want)
    assert torch.equal(q.quantize(x.T, 1, True), want.T)
