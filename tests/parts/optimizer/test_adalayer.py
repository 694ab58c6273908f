"""Oracle of optimizer/adalayer: the card's formula in NumPy, and its identities with Adam."""

import numpy as np
import pytest
import torch

from metier.core import part


def formula(course, lr, wd, b1, b2, eps, per_row):
    p, m, v, out = course.start.copy(), 0.0, 0.0, []
    for t, g in enumerate(course.grads, start=1):
        m = b1 * m + (1 - b1) * g
        layer = tuple(range(1, g.ndim)) if per_row else None
        v = b2 * v + (1 - b2) * np.mean(np.abs(g) ** 2, axis=layer, keepdims=True)
        p = p * (1 - lr * wd) - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        out.append(p)
    return np.stack(out)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(("b1", "b2", "eps"), [(0.9, 0.95, 1e-8), (0.0, 0.5, 0.1)])
def test_formula(course, b1, b2, eps, per_row):
    got = course.run("adalayer", beta1=b1, beta2=b2, eps=eps, per_row=per_row)
    np.testing.assert_allclose(got, formula(course, 0.03, 0.1, b1, b2, eps, per_row), rtol=1e-10)


@pytest.mark.parametrize("per_row", [False, True])
def test_is_adam_when_the_entries_of_every_gradient_are_equally_large(course, per_row):
    course.grads = [np.sign(g + 1e-9) * 3.0 / (t + 1) for t, g in enumerate(course.grads)]
    got = course.run("adalayer", per_row=per_row)
    np.testing.assert_allclose(got, course.run("adamw", beta2=0.95), rtol=1e-12)
    wanted = course.follow(lambda p: torch.optim.AdamW([p], lr=0.03, betas=(0.9, 0.95), weight_decay=0.1))
    np.testing.assert_allclose(got, wanted, rtol=1e-10)


def test_entries_of_a_vector_are_rows(make_course):
    course = make_course((7,))
    got = course.run("adalayer", per_row=True)
    np.testing.assert_allclose(got, course.run("adamw", beta2=0.95), rtol=1e-12)


@pytest.mark.parametrize("name", ["adalayer", "adamw"])
def test_the_scale_of_the_loss_does_not_matter_up_to_eps(matrix, name):
    scaled = type(matrix)((4, 6))
    scaled.grads = [1000 * g for g in scaled.grads]
    np.testing.assert_allclose(scaled.run(name, eps=0.0), matrix.run(name, eps=0.0), rtol=1e-10)
    assert not np.allclose(scaled.run(name, eps=0.5), matrix.run(name, eps=0.5), rtol=1e-4)


def test_inside_a_tensor_the_direction_is_that_of_momentum_sgd(matrix):
    moves = [np.diff(matrix.run(n, weight_decay=0.0), axis=0) for n in ("adalayer", "sgd-momentum")]
    ratio = moves[0] / moves[1]
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1], ratio.shape), rtol=1e-6)


@pytest.mark.parametrize(("per_row", "numbers"), [(False, 1), (True, 40)])
def test_state_is_one_tensor_and_a_number_per_layer(per_row, numbers):
    rule = part.build("optimizer", {"adalayer": {"per_row": per_row}}).obj
    assert sum(v.numel() for v in rule.init(torch.zeros(40, 60)).values()) == 40 * 60 + numbers


def test_a_first_gradient_of_zero_moves_nothing(matrix):
    matrix.grads = [np.zeros((4, 6))] * 3
    np.testing.assert_array_equal(matrix.run("adalayer", weight_decay=0.0)[-1], matrix.start)
