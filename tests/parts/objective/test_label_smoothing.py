"""Oracle of objective/label-smoothing: cdpo and robust-dpo, which are written out elsewhere, and the exchange of all fields.

Bugs it is meant to catch: a field that stays when answers change places (length, reference, score margin, tokens), the weights
exchanged, the unbiased form without its factor.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _referenced import build, random_pairs, value

from metier.core.batch import Pairs, Tokens
from metier.core.errors import UsageError
from metier.parts.objective.label_smoothing import exchanged
from metier.testing import check_part


def test_contract():
    check_part("objective/label-smoothing")


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4])
def test_around_dpo(rate):
    b, of = random_pairs(), {"dpo": {"beta": 0.3}}
    smooth = value("label-smoothing", b, of=of, rate=rate)
    np.testing.assert_allclose(smooth, value("cdpo", b, beta=0.3, label_smoothing=rate), rtol=1e-12)
    unbiased = value("label-smoothing", b, of=of, rate=rate, unbiased=True)
    np.testing.assert_allclose(unbiased, value("robust-dpo", b, beta=0.3, label_smoothing=rate), rtol=1e-9)


@pytest.mark.parametrize("name", ["r-dpo", "ln-dpo", "nca", "apo-down"])
def test_losses_of_single_answers_and_lengths_are_exchanged_whole(name):
    b = random_pairs()
    other = Pairs(
        b.rejected_logps, b.chosen_logps, b.rejected_len, b.chosen_len, b.ref_rejected_logps, b.ref_chosen_logps, -b.margin
    )
    expected = 0.8 * value(name, b) + 0.2 * value(name, other)
    np.testing.assert_allclose(value("label-smoothing", b, of=name, rate=0.2), expected, rtol=1e-12)


def test_the_unbiased_form_is_unbiased_for_any_loss():
    b = random_pairs()
    unbiased = build("label-smoothing", of="apo-down", rate=0.3, unbiased=True)
    mean = 0.7 * unbiased(b)[0] + 0.3 * unbiased(exchanged(b))[0]
    np.testing.assert_allclose(mean, value("apo-down", b), rtol=1e-9)


def test_exchange_of_every_field():
    """Twice is the identity; tokens of a pair change places as blocks, in the order of the text."""
    tokens = Tokens(torch.arange(7.0), torch.ones(7), torch.tensor([0, 0, 1, 2, 3, 3, 3]), ref_logps=torch.arange(7.0) * 10)
    b = replace(random_pairs(2), tokens=tokens)
    e = exchanged(b)
    assert e.tokens.sequence.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert e.tokens.logps.tolist() == [2, 0, 1, 4, 5, 6, 3]
    assert e.tokens.ref_logps.tolist() == [20, 0, 10, 40, 50, 60, 30]
    assert torch.equal(e.margin, -b.margin)
    assert torch.equal(e.chosen_len, b.rejected_len)
    back = exchanged(e)
    for name, v in vars(b).items():
        if isinstance(v, torch.Tensor):
            assert torch.equal(getattr(back, name), v)
    assert back.tokens.logps.tolist() == list(range(7))


def test_metrics_are_those_of_the_labels_as_given():
    b = random_pairs()
    found, expected = build("label-smoothing", of="dpo")(b)[1], build("dpo")(b)[1]
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_odpo_is_refused_with_the_reason():
    with pytest.raises(UsageError, match="answers exchanged.*not above") as e:
        build("label-smoothing", of="odpo")(random_pairs())
    assert "objective/label-smoothing, of odpo" in str(e.value)


@pytest.mark.parametrize(
    ("of", "said"),
    [
        ({"dpo": {"bet": 1.0}}, r"of dpo, option bet: unknown option.*'bet'[^$]*'beta'"),
        ({"dpo": {"beta": -1.0}}, r"of dpo, option beta: beta = -1.0"),
        ("dpp", r"objective/label-smoothing, of dpp: unknown objective 'dpp'[^$]*'dpop'"),
        ("lm", r"of lm: objective/lm reads Tokens"),
        ("r3f", r"of r3f: objective/r3f scores the model by itself"),
    ],
)
def test_errors_name_the_wrapper_and_the_nested_part(of, said):
    with pytest.raises(UsageError, match=said):
        build("label-smoothing", of=of)


def test_wrappers_nest():
    b = random_pairs()
    inside = {"label-smoothing": {"of": {"length-normalized": {"of": {"dpo": {"beta": 5.0}}}}, "rate": 0.0}}
    np.testing.assert_allclose(value("length-normalized", b, of=inside), value("ln-dpo", b), rtol=1e-12)
    with pytest.raises(
        UsageError, match="objective/length-normalized, of label-smoothing, objective/label-smoothing, of dpo, option bta"
    ):
        build("length-normalized", of={"label-smoothing": {"of": {"dpo": {"bta": 5.0}}}})
