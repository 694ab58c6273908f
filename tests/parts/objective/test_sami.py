"""Oracle of objective/sami: both cross-entropies with loops in numpy; the released loss on one matrix.

Bugs it is meant to catch: rows and columns exchanged, summed log-probabilities, several queries in one normaliser, a matrix
read column by column, an accuracy that counts ties as right.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.batch import Lists
from metier.core.errors import UsageError
from metier.testing import check_part

RNG = np.random.default_rng(14)
SIZES = (3, 2, 1, 3)
MATRICES = [-3 * RNG.random((c, c)) for c in SIZES]
LENGTHS = [np.broadcast_to(RNG.integers(2, 9, c), (c, c)) for c in SIZES]
"""An answer has one length under every constitution."""


def batch(matrices=MATRICES, lengths=None):
    """Lists whose token means are these matrices, padded to the largest."""
    lengths = LENGTHS if lengths is None else lengths
    width = max(m.size for m in matrices)
    pad = [(m * n, n * 1.0, np.eye(len(m)), np.ones_like(m)) for m, n in zip(matrices, lengths, strict=True)]
    stacked = [torch.tensor(np.stack([np.pad(p[i].ravel(), (0, width - p[i].size)) for p in pad])) for i in range(4)]
    return Lists(stacked[0], stacked[1], stacked[2], stacked[3].bool())


def sami(b, **options):
    return part.build("objective", {"sami": options}).obj(b)


def by_loops(s, side):
    c = len(s)
    row = -sum(s[i, i] - np.log(sum(np.exp(s[i, j]) for j in range(c))) for i in range(c)) / c
    column = -sum(s[j, j] - np.log(sum(np.exp(s[i, j]) for i in range(c))) for j in range(c)) / c
    return {"row": row, "column": column, "symmetric": (row + column) / 2}[side]


def test_contract():
    check_part("objective/sami")


@pytest.mark.parametrize("side", ["symmetric", "row", "column"])
def test_both_terms(side):
    loss, metrics = sami(batch(), side=side)
    np.testing.assert_allclose(loss.numpy(), [by_loops(m, side) for m in MATRICES], rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(metrics["bound"].numpy(), np.log(SIZES) - loss.numpy(), rtol=1e-10, atol=1e-12)
    wanted = [np.mean(m.argmax(1) == np.arange(len(m))) for m in MATRICES]
    np.testing.assert_allclose(metrics["accuracy_row"].numpy(), wanted)
    wanted = [np.mean(m.argmax(0) == np.arange(len(m))) for m in MATRICES]
    np.testing.assert_allclose(metrics["accuracy_col"].numpy(), wanted)


def test_constant_matrix_knows_nothing():
    loss, metrics = sami(batch([m * 0 - 1.5 for m in MATRICES]))
    np.testing.assert_allclose(loss.numpy(), np.log(SIZES), rtol=1e-12)
    np.testing.assert_allclose(metrics["bound"].numpy(), 0, atol=1e-12)
    np.testing.assert_allclose(metrics["accuracy_row"].numpy(), 1 / np.array(SIZES))
    np.testing.assert_allclose(metrics["accuracy_col"].numpy(), 1 / np.array(SIZES))


def test_invariances():
    """Rows: a constant per constitution is nothing, so a fluency of the answer is something; columns the other way round."""
    shift = np.array([0.3, -1.0, 2.0])
    for side, harmless, harmful in (("row", shift[:, None], shift[None]), ("column", shift[None], shift[:, None])):
        plain = sami(batch(MATRICES[:1], LENGTHS[:1]), side=side)[0]
        torch.testing.assert_close(plain, sami(batch([MATRICES[0] + harmless], LENGTHS[:1]), side=side)[0], rtol=1e-10, atol=0)
        assert abs(plain - sami(batch([MATRICES[0] + harmful], LENGTHS[:1]), side=side)[0]) > 1e-2


def test_same_permutation_of_constitutions_and_answers():
    order = [2, 0, 1]
    plain, moved = batch(MATRICES[:1], LENGTHS[:1]), batch([MATRICES[0][order][:, order]], [LENGTHS[0][:, order]])
    for key in ("accuracy_row", "accuracy_col", "bound"):
        torch.testing.assert_close(sami(plain)[1][key], sami(moved)[1][key], rtol=1e-12, atol=1e-12)


def test_log_softmax_first_changes_nothing():
    m = MATRICES[0]
    again = m - np.log(np.exp(m).sum(1, keepdims=True))
    torch.testing.assert_close(sami(batch([m], LENGTHS[:1]), side="row")[0], sami(batch([again], LENGTHS[:1]), side="row")[0])


@pytest.mark.parametrize(("side", "axis"), [("row", 1), ("column", 0)])
def test_slopes(side, axis):
    """Of the token means: they sum to 0 within each normaliser, and are ``(softmax - 1 on the diagonal) / C``."""
    b = batch()
    leaf = b.logps.requires_grad_()
    (slope,) = torch.autograd.grad(sami(b, side=side)[0].sum(), leaf)
    for n, m in enumerate(MATRICES):
        own = (slope[n][b.present[n]].numpy() * b.length[n][b.present[n]].numpy()).reshape(m.shape)
        p = np.exp(m) / np.exp(m).sum(axis, keepdims=True)
        np.testing.assert_allclose(own, (p - np.eye(len(m))) / len(m), rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(own.sum(axis), 0, atol=1e-14)
        assert not slope[n][~b.present[n]].any()


def test_gradient_is_that_of_the_loss():
    b = batch()
    leaf = b.logps.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sami(replace(b, logps=x))[0], leaf)


def test_two_by_two():
    s = MATRICES[1]
    wanted = np.mean([np.log1p(np.exp(s[0, 1] - s[0, 0])), np.log1p(np.exp(s[1, 0] - s[1, 1]))])
    assert sami(batch([s], LENGTHS[1:2]), side="row")[0].item() == pytest.approx(wanted, rel=1e-12)


def test_queries_stay_apart():
    together = sami(batch())[0]
    for n in range(len(MATRICES)):
        alone = sami(batch(MATRICES[n : n + 1], LENGTHS[n : n + 1]))[0]
        torch.testing.assert_close(together[n : n + 1], alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_extremes(kind):
    b = batch([np.array([[-1e4, 0.0], [0.0, -1e4]]), np.array([[0.0, -1e4], [-1e4, 0.0]])], [np.ones((2, 2))] * 2)
    b = replace(b, **{k: getattr(b, k).to(kind) for k in ("logps", "length", "score")})
    leaf = b.logps.requires_grad_()
    loss, metrics = sami(b)
    assert loss.tolist() == [1e4, 0.0]
    assert torch.isfinite(torch.autograd.grad(loss.sum(), leaf)[0]).all()
    assert metrics["accuracy_row"].tolist() == [0.0, 1.0]


def test_as_the_released_code_writes_it():
    """``[[-1, -2], [-1.5, -0.5]]`` by hand: rows log(1 + e^-1) twice; columns log(1 + e^-0.5) and log(1 + e^-1.5)."""
    loss, _ = sami(batch([np.array([[-1.0, -2.0], [-1.5, -0.5]])], [np.ones((2, 2))]))
    assert loss.item() == pytest.approx((0.31326169 + (0.47407698 + 0.20141328) / 2) / 2, abs=1e-8)


def test_not_a_square():
    b = batch(MATRICES[1:2], LENGTHS[1:2])
    present = b.present.clone()
    present[0, 3] = False
    with pytest.raises(UsageError, match="list of 3 answers"):
        sami(replace(b, present=present))


def test_diagonal_elsewhere():
    b = batch(MATRICES[1:2], LENGTHS[1:2])
    with pytest.raises(UsageError, match="scores of a list must be 1"):
        sami(replace(b, score=b.score.flip(1) * 0 + torch.tensor([0.0, 1.0, 1.0, 0.0])))
