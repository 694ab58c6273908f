"""Oracle of merge/average: NumPy's weighted average in float64."""

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.errors import UsageError
from metier.testing import check_part


def test_contract():
    check_part("merge/average")


def arrays(n):
    return [np.random.default_rng(i).normal(size=(4, 3)) for i in range(n)]


@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 2.0], [0.0, 3.0, 0.5]])
def test_against_numpy(weights):
    given = arrays(3)
    out = part.build("merge", {"average": {"weights": weights}}).obj([torch.tensor(a) for a in given], None)
    np.testing.assert_allclose(out.numpy(), np.average(given, axis=0, weights=weights), rtol=1e-13)


def test_half_precision_is_averaged_in_single():
    # 256 + 1 + 1 … in bfloat16 would stay at 256: the running sum must be wider than the tensors
    given = [torch.full((2,), v, dtype=torch.bfloat16) for v in (256.0, *([1.0] * 255))]
    out = part.build("merge", "average").obj(given, None)
    assert out.dtype == torch.bfloat16
    assert out[0].item() == pytest.approx(511 / 256, rel=4e-3)


def test_order_of_weights_is_the_order_written():
    a, b = torch.tensor([1.0]), torch.tensor([3.0])
    assert part.build("merge", {"average": {"weights": [3.0, 1.0]}}).obj([a, b], None).item() == 1.5


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [0.0, 0.0]])
def test_wrong_weights(weights):
    with pytest.raises(UsageError, match="weights"):
        part.build("merge", {"average": {"weights": weights}}).obj([torch.ones(2)] * 2, None)


def test_negative_weight_is_refused_before_anything_is_read():
    with pytest.raises(UsageError):
        part.build("merge", {"average": {"weights": [-1.0, 2.0]}})
