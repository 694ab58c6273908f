"""Oracle of optimizer/lion: algorithm 2 of the paper in NumPy."""

import numpy as np
import pytest


def formula(course, lr, wd, b1, b2):
    p, m, out = course.start.copy(), np.zeros_like(course.start), []
    for g in course.grads:
        c = b1 * m + (1 - b1) * g
        p = p - lr * (np.sign(c) + wd * p)
        m = b2 * m + (1 - b2) * g
        out.append(p)
    return np.stack(out)


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.99), (0.5, 0.8), (0.0, 0.0)])
def test_formula(course, b1, b2):
    got = course.run("lion", beta1=b1, beta2=b2)
    np.testing.assert_allclose(got, formula(course, 0.03, 0.1, b1, b2), rtol=1e-12)


def test_the_scale_of_the_loss_does_not_matter(matrix):
    scaled = type(matrix)((4, 6))
    scaled.grads = [1024 * g for g in scaled.grads]
    np.testing.assert_array_equal(matrix.run("lion"), scaled.run("lion"))


def test_an_entry_without_gradient_stays(matrix):
    for g in matrix.grads:
        g[1] = 0.0
    moved = matrix.run("lion", weight_decay=0.0)
    np.testing.assert_array_equal(moved[-1][1], matrix.start[1])
    assert (moved[-1][0] != matrix.start[0]).all()
