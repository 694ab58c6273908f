"""Oracle of optimizer/sgd-momentum: the average in NumPy, and torch's SGD at (1 - beta) times the learning
rate.
"""

import numpy as np
import pytest
import torch


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_formula(course, beta, nesterov):
    p, m, out = course.start.copy(), 0.0, []
    for g in course.grads:
        m = beta * m + (1 - beta) * g
        p = p * (1 - 0.03 * 0.1) - 0.03 * (beta * m + (1 - beta) * g if nesterov else m)
        out.append(p)
    got = course.run("sgd-momentum", beta=beta, nesterov=nesterov)
    np.testing.assert_allclose(got, np.stack(out), rtol=1e-10)


@pytest.mark.parametrize("nesterov", [False, True])
def test_as_torch(course, nesterov):
    got = course.run("sgd-momentum", lr=0.3, weight_decay=0.0, nesterov=nesterov)
    wanted = course.follow(lambda p: torch.optim.SGD([p], lr=0.3 * 0.1, momentum=0.9, nesterov=nesterov))
    np.testing.assert_allclose(got, wanted, rtol=1e-10)


def test_a_thousand_times_the_loss_is_a_thousand_times_the_update(matrix):
    scaled = type(matrix)((4, 6))
    scaled.grads = [1000 * g for g in scaled.grads]
    moved = matrix.run("sgd-momentum", weight_decay=0.0) - matrix.start
    np.testing.assert_allclose(scaled.run("sgd-momentum", weight_decay=0.0) - matrix.start, 1000 * moved, rtol=1e-6)
