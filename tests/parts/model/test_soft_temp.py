"""Oracle of model/soft-temp: attention in float64 numpy.

Bugs it is meant to catch: the inverse of the factor, its square (on queries and keys), lost in one of the two ways of
computing attention, or applied before a cap that was there first.
"""

import numpy as np
import torch

from metier.core.forward import hidden_states
from metier.testing import check_part


def test_contract():
    check_part("model/soft-temp")


def test_against_numpy(lab, family, kind):
    model = lab.check("soft-temp", family, kind, options={"beta": 0.3}, logits=lambda z: 0.3 * z)
    assert not lab.attention_of(model).metier_attention.mapped  # SDPA still computes it


def test_order_with_a_cap(lab, kind):
    layout = lab.rows(kind)
    for first, second, logits in (
        (("soft-cap", {"cap": 0.5}), ("soft-temp", {"beta": 0.3}), lambda z: 0.3 * 0.5 * np.tanh(z / 0.5)),
        (("soft-temp", {"beta": 0.3}), ("soft-cap", {"cap": 0.5}), lambda z: 0.5 * np.tanh(0.3 * z / 0.5)),
    ):
        model = lab.load("lab/llama-50k")
        plain = lab.states(model)
        for name, options in (first, second):
            model = lab.apply(name, model, **options)
        x, y = lab.observe(model, layout)
        lab.assert_close(y, lab.expected(plain, model.config, x, layout, logits=logits), layout)


def test_one_is_plain_attention(lab):
    layout = lab.rows("packed")
    with torch.no_grad():
        a = hidden_states(lab.load("lab/qwen2-1m"), layout)
        b = hidden_states(lab.apply("soft-temp", lab.load("lab/qwen2-1m"), beta=1.0), layout)
    assert torch.equal(a, b)
