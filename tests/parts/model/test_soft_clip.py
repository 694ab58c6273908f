"""Oracle of model/soft-clip: attention in float64 numpy; the identities of the card.

Bugs it is meant to catch: rows renormalised, the stretch without its offset, clipping before the stretch, hidden
positions that get weight, zeta and gamma exchanged.
"""

import numpy as np
import pytest
import torch

from metier.core.errors import UsageError
from metier.testing import check_part


def test_contract():
    check_part("model/soft-clip")


@pytest.mark.parametrize(("zeta", "gamma"), [(1.03, -0.03), (1.3, -0.1)])
def test_against_numpy(lab, family, kind, zeta, gamma):
    lab.check(
        "soft-clip", family, kind, options={"zeta": zeta, "gamma": gamma},
        probabilities=lambda p: np.clip((zeta - gamma) * p + gamma, 0, 1),
    )  # fmt: skip


def test_ends_are_exact_and_rows_are_not_renormalised(lab):
    model = lab.apply("soft-clip", lab.load("lab/llama-50k"))
    (clip,) = lab.attention_of(model).metier_attention.probabilities
    p = torch.tensor([0.0, 1.0, 0.03 / 1.06 - 1e-6, 1.03 / 1.06 + 1e-6], dtype=torch.float64)
    assert clip(p).tolist() == [0, 1, 0, 1]
    for n, total in ((1, 1.0), (10, 1.06 - 0.3), (35, 1.06 - 35 * 0.03), (36, 0.0)):
        row = clip(torch.full((n,), 1 / n, dtype=torch.float64))
        assert float(row.sum()) == pytest.approx(total, abs=1e-12)


def test_nothing_to_stretch_is_plain_attention(lab, family, kind):
    lab.check("soft-clip", family, kind, options={"zeta": 1.0, "gamma": 0.0})


def test_options_have_ranges(lab):
    for options in ({"zeta": 0.9}, {"gamma": 0.1}):
        with pytest.raises(UsageError, match=next(iter(options))):
            lab.apply("soft-clip", lab.load("lab/llama-50k"), **options)
