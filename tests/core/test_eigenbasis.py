"""Eigenbases followed from step to step, against NumPy."""

import numpy as np
import pytest
import torch

from metier.core import eigenbasis as eigen


def spd(d, k=2, seed=0):
    x = torch.randn(k, d, 2 * d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x @ x.mT


@pytest.mark.parametrize("d", [1, 5, 127, 128, 129, 300])
def test_moment_on_and_above_the_diagonal(d):
    source = torch.Generator().manual_seed(0)
    total, x = spd(d, seed=1), torch.randn(2, d, 3, dtype=torch.float64, generator=source)
    wanted = 0.75 * total.numpy() + 0.25 * x.numpy() @ x.numpy().swapaxes(1, 2)
    eigen.add_moment_(total, x, 0.25)
    np.testing.assert_allclose(np.triu(total.numpy()), np.triu(wanted), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(eigen.mirrored_(total).numpy(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("back", [False, True])
def test_rotate(axis, back):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 2, 4, 5))
    q = rng.normal(size=(3, x.shape[axis + 1], x.shape[axis + 1]))
    turned = eigen.rotate(torch.tensor(x), torch.tensor(q), axis, back=back).numpy()
    for i in range(3):
        wanted = np.moveaxis(np.tensordot(q[i].T if not back else q[i], x[i], (1, axis)), 0, axis)
        np.testing.assert_allclose(turned[i], wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("shape", [(4, 4), (4, 9), (9, 4)])
def test_eigenbasis(shape):
    x = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    moment = x @ x.mT
    basis = eigen.eigenbasis(0.1 * moment, x)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(shape[0], dtype=x.dtype).expand(2, -1, -1))
    diagonal = basis.mT @ moment @ basis
    values = np.linalg.eigvalsh(moment.numpy())[:, ::-1].copy()
    torch.testing.assert_close(diagonal, torch.diag_embed(torch.tensor(values)), atol=1e-9, rtol=1e-9)


def test_a_null_space_hardly_depends_on_rounding():
    x = torch.randn(1, 12, 3, generator=torch.Generator().manual_seed(4))
    near = x * (1 + 1e-7)
    torch.testing.assert_close(eigen.eigenbasis(x @ x.mT, x), eigen.eigenbasis(near @ near.mT, near), atol=1e-5, rtol=0)


def test_power_iteration_is_sorted_qr():
    a = spd(6).numpy()
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(2, 6, 6)))[0]
    new, order = eigen.power_iteration(torch.tensor(a), torch.tensor(basis))
    for i in range(2):
        wanted = np.argsort(-np.diag(basis[i].T @ a[i] @ basis[i]))
        assert order[i].tolist() == wanted.tolist()
        q = np.linalg.qr(a[i] @ basis[i][:, wanted])[0]
        np.testing.assert_allclose(np.abs(np.diag(q.T @ new[i].numpy())), 1, rtol=1e-10)


def test_power_iteration_finds_the_sorted_eigenbasis():
    values = torch.tensor([9.0, 6.0, 4.0, 2.5, 1.0])
    q = torch.linalg.qr(torch.randn(1, 5, 5, generator=torch.Generator().manual_seed(5)))[0]
    a = q @ torch.diag(values) @ q.mT
    basis = torch.eye(5).unsqueeze(0)
    for _ in range(1000):
        basis, _ = eigen.power_iteration(a, basis)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(5).unsqueeze(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(basis.mT @ a @ basis, torch.diag(values).unsqueeze(0), atol=1e-4, rtol=0)


def test_only_the_chosen_rows_are_renewed():
    moment, basis = spd(4, k=3), torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    turned, placed = torch.randn(3, 4, 2, dtype=torch.float64), torch.rand(3, 4, 2, dtype=torch.float64)
    before = [x.clone() for x in (basis, turned, placed)]
    eigen.renew_(moment, basis, 0, [1], turned, [(placed, 0)])
    for now, old in zip((basis, turned, placed), before, strict=True):
        assert torch.equal(now[[0, 2]], old[[0, 2]])
        assert not torch.equal(now[1], old[1])
    torch.testing.assert_close(eigen.rotate(turned, basis, 0, back=True), before[1])
    torch.testing.assert_close(placed[1].flatten().sort()[0], before[2][1].flatten().sort()[0])


def test_renewal_does_not_see_what_is_stale_below_the_diagonal():
    moment, x = spd(eigen.PANEL + 3, k=1), torch.eye(eigen.PANEL + 3, dtype=torch.float64).unsqueeze(0)
    wanted, _ = eigen.power_iteration(moment, x)
    stale = moment.clone()
    stale[:, eigen.PANEL :, : eigen.PANEL] = 7.0
    eigen.renew_(stale, x, 0, [0], torch.zeros(1, len(x[0]), 1, dtype=x.dtype), [])
    torch.testing.assert_close(x, wanted)


def test_decompositions_that_do_not_converge_are_repeated_in_float64():
    seen = []

    def decompose(a):
        seen.append(a.dtype)
        if a.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return a

    assert eigen._safely(decompose, torch.ones(2)).dtype == torch.float32
    assert seen == [torch.float32, torch.float64]


@pytest.mark.parametrize(
    ("shape", "limit", "wanted"),
    [((2, 3, 4), 6, (6, 4)), ((2, 3, 4), 24, (24,)), ((2, 3, 4), 5, (2, 3, 4)), ((30, 2, 3), 10, (30, 6)), ((1, 5, 1), 4, (5, 1)),
     ((1, 1), 9, (1,))],
)  # fmt: skip
def test_fused(shape, limit, wanted):
    assert eigen.fused(shape, limit) == wanted


def test_due_once_in_a_period_and_evenly():
    kinds = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    names = [f"model.layers.{i}.{kind}.weight" for kind in kinds for i in range(10)]
    lists = [eigen.due(names, 0, s, 10, True) for s in range(7, 17)]
    assert sorted(i for rows in lists for i in rows) == list(range(len(names)))
    assert {len(rows) for rows in lists} == {len(kinds)}
    assert eigen.due(names, 0, 1, 10, True) != eigen.due(names, 1, 1, 10, True)
    assert [eigen.due(names, 0, s, 10, False) for s in (9, 10)] == [[], list(range(len(names)))]
    assert eigen.due(names, 0, 3, 1, True) == list(range(len(names)))
