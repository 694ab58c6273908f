"""What holds for every objective on lists: ragged lists are the lists alone, order of the answers is nothing, ties are no preference.

Bugs it is meant to catch: absent answers in a softmax or a mean, sorting that depends on the input order, an index of the best
answer instead of a set, NaN from masked branches, gradients that are not those of the loss.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.batch import Lists
from metier.core.preferences import average, best, better, list_metrics, log_softmax, worst

ORDERED = {
    "pl_dpo": {}, "pro": {}, "pro plain": {"temperatures": False}, "rrhf": {}, "lipo": {"beta": 1.0},
}  # fmt: skip
SCORED = {"dro": {}, "infonca": {"alpha": 0.7}, "nca_list": {"alpha": 0.7}, "exo_list": {"beta_r": 0.7}}
ALL = {**ORDERED, **SCORED}
PRESENT = torch.tensor(
    [[True] * 5, [True, True, True, False, False], [True, False, True, True, False], [True, True, False, False, False]]
)


def objective(name):
    return part.build("objective", {name.split()[0]: ALL[name]}).obj


def lists(present=PRESENT, seed=0, kind=torch.float64):
    rng = np.random.default_rng(seed)
    shape = tuple(present.shape)
    length = torch.tensor(rng.integers(2, 9, shape), dtype=kind) * present
    logps, ref = (torch.tensor(-30 * rng.random(shape) - 1, dtype=kind) * present for _ in range(2))
    return Lists(logps, length, torch.tensor(rng.standard_normal(shape), dtype=kind), present, ref)


def picked(b, row, columns):
    """One list with only these answers, in this order."""
    return Lists(*(getattr(b, f)[row : row + 1][:, columns] for f in ("logps", "length", "score", "present", "ref_logps")))


def gradient(f, b):
    leaf = b.logps.clone().requires_grad_()
    (found,) = torch.autograd.grad(f(replace(b, logps=leaf))[0].sum(), leaf)
    return found


@pytest.mark.parametrize("name", ALL)
def test_ragged_lists_are_the_lists_alone(name):
    f, b = objective(name), lists()
    loss, metrics = f(b)
    slope = gradient(f, b)
    for row in range(len(b.present)):
        columns = b.present[row].nonzero().squeeze(1)
        alone = picked(b, row, columns)
        torch.testing.assert_close(loss[row : row + 1], f(alone)[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(slope[row : row + 1, columns], gradient(f, alone), rtol=1e-10, atol=1e-13)
        assert slope[row, ~b.present[row]].abs().sum() == 0
        for key, value in f(alone)[1].items():
            torch.testing.assert_close(metrics[key][row], value.squeeze(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_absent_answers_are_never_read(name):
    f, b = objective(name), lists()
    poisoned = replace(
        b, **{k: getattr(b, k).masked_fill(~b.present, v) for k, v in (("score", 7.0), ("logps", -3.0), ("length", 4.0))}
    )
    torch.testing.assert_close(f(b)[0], f(poisoned)[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("ties", [False, True])
def test_order_of_the_answers(name, ties):
    f, b = objective(name), lists()
    if ties:
        b = replace(b, score=b.score.round())
    order = torch.tensor([3, 0, 4, 2, 1])
    moved = Lists(*(getattr(b, k)[:, order] for k in ("logps", "length", "score", "present", "ref_logps")))
    torch.testing.assert_close(f(b)[0], f(moved)[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(f, b)[:, order], gradient(f, moved), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ORDERED)
def test_scores_all_equal_say_nothing(name):
    options = {**ORDERED[name], **({"sft_weight": 0.0} if name.split()[0] in ("pro", "rrhf") else {})}
    f = part.build("objective", {name.split()[0]: options}).obj
    b = replace(lists(), score=torch.full(PRESENT.shape, 0.3, dtype=torch.float64))
    assert f(b)[0].abs().max() < 1e-12
    assert gradient(f, b).abs().max() < 1e-12


@pytest.mark.parametrize("name", ALL)
def test_constant_of_the_scores(name):
    """Only differences of scores count (in LiPO, ratios of gains: one more point doubles the loss)."""
    f, b = objective(name), lists()
    factor = 2.0 if name == "lipo" else 1.0
    torch.testing.assert_close(factor * f(b)[0], f(replace(b, score=b.score + 1))[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_gradient_is_that_of_the_loss(name):
    """LiPO's weights and RRHF's hinges are constant in a neighbourhood, so that finite differences agree there too."""
    f, b = objective(name), lists()
    leaf = b.logps.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: f(replace(b, logps=x * b.present))[0], leaf, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e4, 1e-7])
def test_extremes(name, kind, size):
    b = lists(kind=kind)
    for flip in (0, 1):
        pattern = (torch.arange(5) + flip) % 2
        extreme = replace(b, logps=(-size * pattern.to(kind)).expand_as(b.logps) * b.present, ref_logps=b.ref_logps * 0)
        loss, metrics = objective(name)(extreme)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient(objective(name), extreme)).all()
        assert all(torch.isfinite(m).all() for m in metrics.values())


@pytest.mark.parametrize("name", ALL)
def test_lists_of_one_or_none(name):
    """One answer has no order: at most its own likelihood counts. No answer: 0, never NaN."""
    present = torch.tensor([[True, False], [False, False]])
    b, f = lists(present), objective(name)
    loss = f(b)[0]
    assert torch.isfinite(loss).all()
    assert loss[1] == 0
    assert torch.isfinite(gradient(f, b)).all()
    if name in ("pl_dpo", "pro", "pro plain", "lipo", "dro", "infonca", "exo_list"):
        assert loss[0].abs() < 1e-12


@pytest.mark.parametrize("name", ["pl_dpo", "lipo", *SCORED])
def test_reference_is_declared(name):
    assert "reference" in part.build("objective", {name: {}}).card.needs


@pytest.mark.parametrize("name", ["pro", "rrhf", "sami"])
def test_reference_free(name):
    assert "reference" not in part.build("objective", {name: {}}).card.needs


# --- the helpers in core.preferences -------------------------------------------------------------------------


def small(score, present=None):
    score = torch.tensor([score], dtype=torch.float64)
    present = torch.ones_like(score).bool() if present is None else torch.tensor([present])
    return Lists(score, score * 0 + 1, score, present)


def test_better_best_worst():
    b = small([1.0, 3.0, 3.0, 0.0, 9.0], [True, True, True, True, False])
    assert best(b).tolist() == [[False, True, True, False, False]]
    assert worst(b).tolist() == [[False, False, False, True, False]]
    assert better(b)[0].nonzero().tolist() == [[0, 3], [1, 0], [1, 3], [2, 0], [2, 3]]


def test_list_metrics_by_hand():
    b = small([1.0, 3.0, 3.0, 0.0, 9.0], [True, True, True, True, False])
    m = list_metrics(torch.tensor([[2.0, 5.0, 2.0, 4.0, -99.0]], dtype=torch.float64), b)
    # ordered pairs: (0,3) wrong, (1,0) right, (1,3) right, (2,0) tie, (2,3) wrong
    assert m["accuracy"].item() == pytest.approx(2.5 / 5)
    assert (m["chosen_reward"].item(), m["rejected_reward"].item(), m["margin"].item()) == (3.5, 4.0, -0.5)
    assert list_metrics(b.score, small([1.0, 1.0, 1.0, 1.0, 1.0]))["accuracy"].item() == 0.5


def test_masked_softmax_and_average():
    x, present = torch.tensor([[1.0, 2.0, 50.0], [0.0, 0.0, 0.0]]), torch.tensor([[True, True, False], [False] * 3])
    np.testing.assert_allclose(log_softmax(x, present)[0].numpy(), [-np.log1p(np.e), 1 - np.log1p(np.e), 0], rtol=1e-6)
    assert log_softmax(x, present)[1].tolist() == [0, 0, 0]
    assert average(x, present).tolist() == [1.5, 0.0]
