"""Oracle of optimizer/lion-ar: the card's algorithm in NumPy, its exact identities, the authors' rotational code.

Bugs it is meant to catch: columns for rows, the length after the step for the one at the start, the angle from the
scheduled learning rate where the peak belongs, projection before centring, an average of |d| for one of |d|²,
decay applied beside the rotation, signal and noise exchanged.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from metier.core import models, part
from metier.core.errors import UsageError
from metier.core.optim import Optimizer, Step, build

LRS = [0.02, 0.02, 0.015, 0.01, 0.02, 0.005, 0.01, 0.002, 0.01, 0.01]


def rule(**options):
    return part.build("optimizer", {"lion-ar": options}).obj


def run(course, *, weight_decay=0.1, lrs=LRS, dtype=torch.float64, **options):
    p = nn.Parameter(torch.tensor(course.start, dtype=dtype))
    optimizer = Optimizer([("w", p)], rule(**options), lr=0.02, weight_decay=weight_decay)
    seen = []
    for lr, g in zip(lrs, course.grads, strict=False):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = torch.tensor(g, dtype=dtype)
        optimizer.step()
        seen.append(p.detach().double().numpy().copy())
    return np.stack(seen)


def formula(
    course, wd=0.1, beta=0.9, nesterov=False, per_neuron=True, zero_mean=False, projection=True, norm_beta=0.0,
    angular_schedule="linear", inverse_bias_correction=False, rrc_batch=None, rrc_beta=0.99,
):  # fmt: skip
    """One row, or the whole tensor, at a time."""
    shape = course.start.shape
    w = course.start.reshape(shape[0] if per_neuron else 1, -1).copy()
    rho = np.linalg.norm(w, axis=1)
    if zero_mean:
        w = w - w.mean(1, keepdims=True)
        w *= (rho / np.linalg.norm(w, axis=1))[:, None]
    m, d2, n_g, n_m, k, out = np.zeros_like(w), np.zeros(len(w)), 0.0, 0.0, 0.0, []
    kappa, peak = (1 - beta) / (1 + beta), 0.02
    for t, (lr, g) in enumerate(zip(LRS, course.grads, strict=False), 1):
        g = g.reshape(w.shape)
        m = beta * m + (1 - beta) * g
        d = np.sign(beta * m + (1 - beta) * g if nesterov else m)
        angle = math.sqrt(2 * lr * wd * kappa) if angular_schedule == "sqrt" else math.sqrt(2 * peak * wd * kappa) * lr / peak
        angle *= 1 - beta**t if inverse_bias_correction else 1
        if rrc_batch:
            n_g = rrc_beta * n_g + (1 - rrc_beta) * (g**2).sum()
            n_m = rrc_beta * n_m + (1 - rrc_beta) * ((m / (1 - beta**t)) ** 2).sum()
            k = rrc_beta * k + (1 - rrc_beta) * kappa * (1 + beta**t) / (1 - beta**t)
            full = 1 - rrc_beta**t
            noise = 0.0 if t == 1 else min(n_g / full, max(0.0, (n_g - n_m) / full / (1 - k / full)))
            signal = n_g / full - noise
            angle *= math.sqrt((1 + signal / noise / rrc_batch) / (1 + signal / noise)) if noise else 1 / math.sqrt(rrc_batch)
        for i in range(len(w)):
            row, new = d[i], w[i]
            row = row - row.mean() if zero_mean else row
            row = row - new * (row @ new) / rho[i] ** 2 if projection else row
            d2[i] = norm_beta * d2[i] + (1 - norm_beta) * (row @ row)
            size = math.sqrt(d2[i] / (1 - norm_beta**t))
            new = new - angle * rho[i] * row / size
            w[i] = new * rho[i] / np.linalg.norm(new)
        out.append(w.reshape(shape).copy())
    return np.stack(out)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.98, "nesterov": True, "inverse_bias_correction": True},
        {"zero_mean": True, "norm_beta": 0.9, "angular_schedule": "sqrt"},
        {"per_neuron": False, "norm_beta": 0.5},
        {"per_neuron": False, "zero_mean": True, "projection": False, "nesterov": True},
        {"projection": False, "beta": 0.5},
        {"rrc_batch": 16},
        {"rrc_batch": 4, "rrc_beta": 0.5, "beta": 0.6, "inverse_bias_correction": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 4)], ids=str)
def test_formula(make_course, shape, options):
    course = make_course(shape)
    np.testing.assert_allclose(run(course, **options), formula(course, **options), rtol=1e-10, atol=1e-12)


def test_rows_keep_their_length_and_turn_by_the_arc_tangent(make_course):
    course = make_course((5, 40))
    track = np.concatenate([course.start[None], run(course, weight_decay=0.3, lrs=[0.02] * 10)])
    lengths = np.linalg.norm(track, axis=2)
    np.testing.assert_allclose(lengths, np.broadcast_to(lengths[0], lengths.shape), rtol=1e-12)
    angles = np.arccos((track[1:] * track[:-1]).sum(2) / lengths[0] ** 2)
    np.testing.assert_allclose(angles, math.atan(math.sqrt(2 * 0.02 * 0.3 / 19)), rtol=1e-9)


def test_lengths_hold_in_float32(make_course):
    course = make_course((5, 40))
    track = run(course, weight_decay=0.3, dtype=torch.float32)
    start = np.linalg.norm(course.start, axis=1)
    np.testing.assert_allclose(np.linalg.norm(track[-1], axis=1), start, rtol=1e-6)


# --- the signal-to-noise multiplier ----------------------------------------------------------------------------


def stats_after(signal, batch, steps, size=4000, beta=0.9):
    source = torch.Generator().manual_seed(0)
    one = rule(rrc_batch=batch, beta=beta)
    w = torch.randn(1, size, generator=source)
    state, along = one.init(w), torch.randn(1, size, generator=source)
    for t in range(1, steps + 1):
        g = signal * along + torch.randn(1, size, generator=source) / math.sqrt(batch)
        one.apply([w], [g], [state], Step(t=t, lr=1e-4, weight_decay=0.1, peak=1e-4, names=("w",)))
    return state["stats"][None] / (1 - 0.99**steps)


@pytest.mark.parametrize(("signal", "batch"), [(0.1, 50), (0.5, 16), (0.05, 400)])
def test_signal_to_noise_is_recovered(signal, batch):
    from metier.parts.optimizer._snr import split

    found, noise = split(stats_after(signal, batch, 500))
    assert float(found / noise) == pytest.approx(batch * signal**2, rel=0.1)


def test_the_estimate_is_right_early_too():
    """The published form with the bare k gives less than a fifth of the signal after 10 steps."""
    from metier.parts.optimizer._snr import split

    found, noise = split(stats_after(0.5, 16, 10, size=200_000))
    assert float(found / noise) == pytest.approx(4.0, rel=0.05)


def test_limits_of_the_multiplier():
    from metier.parts.optimizer._snr import multiplier

    def c(s, batch):
        return float(multiplier(torch.tensor([[1 + s, s + 0.1, 0.1]], dtype=torch.float64), batch))

    assert c(0.0, 64) == pytest.approx(1.0)
    assert c(1e-6, 64) == pytest.approx(1.0, abs=1e-5)
    assert [c(s, 1) for s in (0.01, 1.0, 100.0)] == pytest.approx([1.0] * 3)
    assert c(3.0, 64) == pytest.approx(math.sqrt((1 + 3 / 64) / 4))
    assert c(1e9, 64) == pytest.approx(1 / 8, rel=1e-3)
    assert float(multiplier(torch.zeros(1, 3), 8)) == 1.0
    with pytest.raises(UsageError, match="signal from noise"):
        rule(rrc_batch=8, beta=0.0)


# --- what is turned, and what is not ---------------------------------------------------------------------------


def test_roles():
    one, tables = rule(beta=0.95, nesterov=True), rule(tables=True)
    lion = part.build("optimizer", {"lion-a": {"beta": 0.95, "nesterov": True}}).obj
    assert [one.for_role(r) for r in ("matrices", "tensors", "embeddings", "head", "rest")] == [one, one, lion, lion, lion]
    assert [type(tables.for_role(r)).__name__ for r in ("embeddings", "head", "rest")] == ["LionAR", "LionAR", "LionA"]


def test_in_a_model_hidden_rows_keep_their_length_and_the_tied_table_does_not():
    model = models.load("lab/llama-50k", seed=0).model
    optimizer = build(model, part.build("optimizer", "lion-ar"), lr=1e-2, weight_decay=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    source = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=source)
        optimizer.step()
    for name, p in model.named_parameters():
        kept = torch.allclose(p.norm(dim=-1), before[name].norm(dim=-1), rtol=1e-5) if p.ndim == 2 else False
        assert kept == ("proj" in name), name
        assert not torch.equal(p, before[name]), name


def test_without_decay_there_is_no_angle_and_lion_a_moves_it(matrix):
    got = run(matrix, weight_decay=0.0, lrs=[0.02] * 10)
    np.testing.assert_array_equal(got, matrix.run("lion-a", lr=0.02, weight_decay=0.0))


def test_columns_of_one_entry_are_moved_by_lion_a(make_course):
    course = make_course((7, 1))
    np.testing.assert_array_equal(run(course, lrs=[0.02] * 10), course.run("lion-a", lr=0.02, weight_decay=0.1))


def test_a_tensor_of_zeros_is_refused_by_name_and_a_row_of_zeros_stays(make_course):
    course = make_course((4, 6))
    course.start[2] = 0.0
    got = run(course)
    assert (got[-1][2] == 0).all()
    assert np.isfinite(got).all()
    course.start[:] = 0.0
    with pytest.raises(UsageError, match="w is all zeros") as e:
        run(course)
    assert "weight decay 0" in str(e.value)


def test_a_row_without_gradient_stays(matrix):
    for g in matrix.grads:
        g[1] = 0.0
    np.testing.assert_allclose(run(matrix, projection=False)[-1][1], matrix.start[1], rtol=1e-14)


# --- the authors' earlier code ---------------------------------------------------------------------------------

# epfml/REQ at bab824d (June 2024), shared/optimizers/rotational_lion.py, RotationalLion(lr 0.02 at the start, then LRS,
# betas (0.81, 0.9), weight_decay 0.3, rotational_eps 0) in float64: the last of 8 steps. Its Lion with betas (β², β) has
# the signs of Nesterov momentum β; its constant √(π/2) √((1-b1)² + b1² (1-b2)/(1+b2)) is put into the weight decay.
RELEASED = {
    (True, 0.9, True): [[0.44679349, -0.55252627, 0.72092311, -0.61519033],
                        [0.69141, -0.77499619, 0.73972528, -0.65613909],
                        [0.73244966, -0.71007911, 0.9005518, -0.92292235]],
    (False, 0.0, True): [[0.39940503, -0.5845427, 0.69270579, -0.64964845],
                         [0.65903537, -0.75224666, 0.78509603, -0.66317451],
                         [0.65552951, -0.79944977, 0.80944467, -0.98966384]],
    (False, 0.5, False): [[0.38411853, -0.55028559, 0.65332811, -0.60404601],
                          [0.65273543, -0.69595332, 0.71027465, -0.60771566],
                          [0.73815382, -0.85411185, 0.87979645, -1.04318673]],
}  # fmt: skip


@pytest.mark.parametrize(("setting", "expected"), RELEASED.items(), ids=str)
def test_parity_with_the_rotational_code(make_course, setting, expected):
    course, i = make_course((3, 4)), np.arange(12).reshape(3, 4)
    course.start = np.cos(1.0 + 3.1 * i)
    course.grads = [np.sin((t + 1) * (1.7 * i + 0.3)) for t in range(8)]
    b1, b2 = 0.81, 0.9
    theirs = math.pi / 2 * ((1 - b1) ** 2 + b1**2 * (1 - b2) / (1 + b2))
    zero_mean, norm_beta, per_neuron = setting
    got = run(
        course, weight_decay=0.3 * theirs * (1 + b2) / (1 - b2), beta=b2, nesterov=True, angular_schedule="sqrt",
        zero_mean=zero_mean, norm_beta=norm_beta, per_neuron=per_neuron,
    )  # fmt: skip
    np.testing.assert_allclose(got[-1], expected, rtol=0, atol=2e-8)


def test_the_angle_is_that_of_the_rotational_adamw(make_course):
    """RotationalAdamW(lr 0.02, betas (0.9, 0.99), weight_decay 0.3, strict), same code: first step 0.0251259457 rad."""
    course = make_course((1, 4))
    (first,) = run(course, weight_decay=0.3, lrs=[0.02])
    cosine = (first * course.start).sum() / (course.start**2).sum()
    assert math.acos(cosine) == pytest.approx(0.025125945715, abs=1e-9)
