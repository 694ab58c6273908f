"""Oracle of optimizer/signum: the formula in NumPy, and its identity with Lion at equal betas."""

import numpy as np
import pytest


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_formula(course, beta):
    p, m, out = course.start.copy(), np.zeros_like(course.start), []
    for g in course.grads:
        m = beta * m + (1 - beta) * g
        p = p * (1 - 0.03 * 0.1) - 0.03 * np.sign(m)
        out.append(p)
    np.testing.assert_allclose(course.run("signum", beta=beta), np.stack(out), rtol=1e-12)


def test_is_lion_with_equal_betas_to_the_last_bit(course):
    np.testing.assert_array_equal(course.run("signum", beta=0.9), course.run("lion", beta1=0.9, beta2=0.9))
