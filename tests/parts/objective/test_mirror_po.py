"""Mirror PO: five members against the library's own losses and closed forms, curves against NumPy, files there and back.

Bugs it is meant to catch: a scale that changes the known losses, a curve that falls somewhere, the reference term with the
wrong sign, progress ignored or applied to some weights only, numbers lost in the file.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from _pairwise import all_pairs, at_reference, build, letters, minimised, of, pairs, ref_randomised, sig, slopes, softplus, values

from metier.core import part
from metier.core.errors import UsageError
from metier.parts.objective import _mirror as mirror
from metier.parts.objective.mirror_po import read, write
from metier.testing import check_part

B = replace(pairs(0, 12), tokens=None)
A = letters(B)


def mpo(**options):
    return build("mirror-po", **options)


def test_contract():
    check_part("objective/mirror-po")


MEMBERS = {
    "dpo": ({"beta": 0.3}, {"beta": 0.3}),
    "orpo": ({"lam_p": 0.25}, {"lam": 0.25}),
    "cpo": ({"beta": 0.3, "lam_s": 0.7}, {"beta": 0.3, "c": 0.7}),
    "simper": ({}, {}),
    "ipo": ({"tau": 0.2}, {"tau": 0.2}),
}


@pytest.mark.parametrize("shape", MEMBERS)
@pytest.mark.parametrize("default", [True, False])
def test_members_are_the_librarys_losses(shape, default):
    options, own = ({}, {}) if default else MEMBERS[shape]
    a, b = mpo(shape=shape, **options), build(shape, **own)
    np.testing.assert_allclose(values(a, B), values(b, B), rtol=1e-9, atol=1e-9)
    for x, y in zip(slopes(a, B), slopes(b, B), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)
    assert a.needs == (frozenset(["reference"]) if shape in ("dpo", "ipo") else frozenset())
    assert a.monotone == (shape != "ipo")


def test_members_by_formula():
    p, q = np.exp(A.aw), np.exp(A.al)
    odds = np.log(p / (1 - p)) - np.log(q / (1 - q))
    expected = {
        "dpo": softplus(-0.3 * A.h), "orpo": -A.aw + 0.25 * softplus(-odds), "cpo": softplus(-0.3 * A.m) - 0.7 * A.aw,
        "simper": q - p, "ipo": (A.Rw - A.Rl - 2.5) ** 2,
    }  # fmt: skip
    for shape, loss in expected.items():
        np.testing.assert_allclose(values(mpo(shape=shape, **MEMBERS[shape][0]), B), loss, rtol=1e-9, atol=1e-12)


def test_slopes_by_formula():
    p, q = np.exp(A.aw), np.exp(A.al)
    odds = np.log(p / (1 - p)) - np.log(q / (1 - q))
    expected = {
        "dpo": (-0.3 * sig(-0.3 * A.h), 0.3 * sig(-0.3 * A.h)),
        "orpo": ((-1 - 0.25 * sig(-odds) / (1 - p)) / A.nw, 0.25 * sig(-odds) / (1 - q) / A.nl),
        "cpo": (-0.3 * sig(-0.3 * A.m) - 0.7 / A.nw, 0.3 * sig(-0.3 * A.m)),
        "simper": (-p / A.nw, q / A.nl),
        "ipo": (2 * (A.Rw - A.Rl - 2.5) / A.nw, -2 * (A.Rw - A.Rl - 2.5) / A.nl),
    }
    for shape, by in expected.items():
        for found, wanted in zip(slopes(mpo(shape=shape, **MEMBERS[shape][0]), B), by, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-12)


# --- curves ----------------------------------------------------------------------------------------------------


OF_U = {
    "u": lambda u: u, "u2": lambda u: u**2, "u3": lambda u: u**3, "sqrt": np.sqrt, "cbrt": np.cbrt, "log": np.log,
    "logit": lambda u: np.log(u / (1 - u)), "inverse": lambda u: -1 / u, "tanh": lambda u: np.tanh(4 * (u - 0.3)),
    "unit": lambda u: np.tanh(0.7 * np.log(u) + 0.2),
}  # fmt: skip
OF_Z = {
    "logsig": lambda z: -softplus(-2 * z), "softplus": lambda z: -softplus(1.5 - z), "linear": lambda z: z,
    "square": lambda z: -((z - 2) ** 2), "half-square": lambda z: -(np.maximum(2 - z, 0) ** 2), "exp": lambda z: -np.exp(-z),
}  # fmt: skip
AT = {"tanh": (0.3,), "unit": (0.7, 0.2), "logsig": (2.0,), "softplus": (1.5,), "square": (2.0,), "half-square": (2.0,)}


def curve(basis, names, raw, slope=1.0):
    return mirror.Curve(basis, [(n, AT.get(n, ())) for n in names], torch.as_tensor(raw, dtype=torch.float64), slope)


@pytest.mark.parametrize(("basis", "numpy", "middle"), [(mirror.OF_U, OF_U, 0.5), (mirror.OF_Z, OF_Z, 0.0)], ids=["u", "z"])
def test_basis(basis, numpy, middle):
    """Every function alone: its shape, with slope 1 in the middle."""
    assert set(basis) == set(numpy)
    x = np.linspace(0.01, 0.99, 50) if middle else np.linspace(-4, 4, 50)
    for name, f in numpy.items():
        slope = (f(middle + 1e-6) - f(middle - 1e-6)) / 2e-6
        found = curve(basis, [name], [[0.3, 0.0]])(torch.tensor(np.log(x) if middle else x))
        np.testing.assert_allclose(found.numpy(), f(x) / slope, rtol=1e-6, atol=1e-9, err_msg=name)


def test_mixture():
    names, raw = ["log", "u", "logit"], np.array([[0.2, 1.0], [-1.0, -2.0], [0.5, 0.0]])
    u, t = np.linspace(0.02, 0.98, 20), 0.4
    weights = softplus(raw[:, 0] + t * raw[:, 1])
    expected = sum(w * OF_U[n](u) for w, n in zip(weights, names, strict=True)) / (weights @ [2, 1, 4]) * 3
    found = curve(mirror.OF_U, names, raw, 3.0)(torch.tensor(np.log(u)), t)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_many_curves_at_once():
    raw = np.random.default_rng(0).normal(size=(5, 3, 2))
    names, x = ["log", "u3", "sqrt"], -np.random.default_rng(1).random((5, 7))
    slope = np.arange(1.0, 6.0)
    found = curve(mirror.OF_U, names, raw, torch.tensor(slope)[:, None])(torch.tensor(x), 0.3)
    for i in range(5):
        alone = curve(mirror.OF_U, names, raw[i], slope[i])(torch.tensor(x[i]), 0.3)
        np.testing.assert_allclose(found[i].numpy(), alone.numpy(), rtol=1e-12)


def test_curves_increase():
    """For any coefficients, at any time; ``square`` alone is left out, it falls on purpose."""
    rng = np.random.default_rng(2)
    lu, z = torch.log(torch.linspace(1e-5, 1 - 1e-5, 400, dtype=torch.float64)), torch.linspace(-9, 9, 400, dtype=torch.float64)
    for basis, x in ((mirror.OF_U, lu), (mirror.OF_Z, z)):
        names = [n for n in basis if not (basis is mirror.OF_Z and n == "square")]
        for _ in range(30):
            values = curve(basis, names, rng.normal(scale=4, size=(len(names), 2)))(x, rng.random())
            assert (values.diff() >= -1e-12).all()


def test_curves_at_the_ends():
    for basis, ends in ((mirror.OF_U, [-1e4, -1e-9, 0.0]), (mirror.OF_Z, [-1e4, 0.0, 1e4])):
        for dtype in (torch.float32, torch.float64):
            x = torch.tensor(ends, dtype=dtype, requires_grad=True)
            value = curve(basis, list(basis), np.zeros((len(basis), 2)))(x)
            (slope,) = torch.autograd.grad(value.sum(), x)
            assert value.dtype == dtype
            assert torch.isfinite(value).all()
            assert torch.isfinite(slope).all()


# --- files -----------------------------------------------------------------------------------------------------


def made(**more):
    rng = np.random.default_rng(3)
    terms = lambda basis, names: tuple(
        mirror.Term(basis=n, at=AT.get(n, ()), raw=tuple(rng.normal(size=2).tolist())) for n in (names or basis)
    )
    return mirror.Coefficients(
        reference=True, lam_s=(-0.4, 0.9), lam_p=(0.3, -0.2),
        phi=mirror.Shape(slope=1.7, terms=terms(mirror.OF_U, None)), psi=mirror.Shape(slope=2.0, terms=terms(mirror.OF_U, ["log", "u"])),
        g=mirror.Shape(slope=0.5, terms=terms(mirror.OF_Z, ["logsig", "linear", "exp"])), **more,
    )  # fmt: skip


def test_round_trip(tmp_path):
    write(tmp_path / "a.json", made())
    assert read(tmp_path / "a.json") == made()
    objective = mpo(shape="custom", coefficients=str(tmp_path / "a.json"))
    write(tmp_path / "b.json", objective.coefficients)
    again = mpo(shape="custom", coefficients=str(tmp_path / "b.json"))
    np.testing.assert_array_equal(values(objective, B), values(again, B))
    assert objective.needs == frozenset(["reference"])


def test_custom_by_formula(tmp_path):
    """Everything at once, at half the training."""
    c, t = made(), 0.5
    write(tmp_path / "a.json", c)
    objective = mpo(shape="custom", coefficients=str(tmp_path / "a.json"), beta=1.3)
    objective.progress = t

    def f(shape, numpy, x, middle):
        w = np.array([softplus(term.raw[0] + t * term.raw[1]) for term in shape.terms])
        slope = [(numpy[s.basis](middle + 1e-6) - numpy[s.basis](middle - 1e-6)) / 2e-6 for s in shape.terms]
        return shape.slope * sum(v * numpy[s.basis](x) for v, s in zip(w, shape.terms, strict=True)) / (w @ slope)

    p, q, rp, rq = (np.exp(v) for v in (A.aw, A.al, B.ref_chosen_logps.numpy() / A.nw, B.ref_rejected_logps.numpy() / A.nl))
    z = 1.3 * (f(c.phi, OF_U, p, 0.5) - f(c.phi, OF_U, q, 0.5) - f(c.phi, OF_U, rp, 0.5) + f(c.phi, OF_U, rq, 0.5))
    lam_s, lam_p = softplus(-0.4 + 0.9 * t), softplus(0.3 - 0.2 * t)
    expected = -lam_s * f(c.psi, OF_U, p, 0.5) - lam_p * f(c.g, OF_Z, z, 0.0)
    np.testing.assert_allclose(values(objective, B), expected, rtol=1e-6)
    np.testing.assert_allclose(objective(B)[1]["margin"].numpy(), z, rtol=1e-6)
    np.testing.assert_allclose(objective(B)[1]["imitation"].numpy(), f(c.psi, OF_U, p, 0.5), rtol=1e-6)


def still(c):
    """The same coefficients without change in time."""
    fixed = lambda shape: shape.model_copy(
        update={"terms": tuple(term.model_copy(update={"raw": (term.raw[0], 0.0)}) for term in shape.terms)}
    )
    names = {"lam_s": (c.lam_s[0], 0.0), "lam_p": (c.lam_p[0], 0.0)}
    return c.model_copy(update={**names, **{k: fixed(getattr(c, k)) for k in ("phi", "psi", "g")}})


def test_time(tmp_path):
    """With ``a' = 0`` the loss stands still; with ``a'`` it moves, and starts where the still one is."""
    write(tmp_path / "a.json", made())
    write(tmp_path / "b.json", still(made()))
    moving, static = (mpo(shape="custom", coefficients=str(tmp_path / f"{n}.json")) for n in "ab")
    assert moving.progress == static.progress == 0.0
    start = values(moving, B)
    np.testing.assert_array_equal(start, values(static, B))
    moving.progress = static.progress = 1.0
    np.testing.assert_array_equal(start, values(static, B))
    assert np.abs(values(moving, B) - start).min() > 1e-6


def test_the_core_sets_progress():
    """Before each step."""
    from metier.core import models
    from metier.core.lossmodule import LossModule

    built = part.build("objective", {"mirror-po": {"shape": "orpo"}})
    LossModule(models.load("lab/llama-50k").model, built).begin_step(0.25)
    assert built.obj.progress == 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phi": {"terms": []}}, "phi.terms"),
        ({"phi": {"terms": [{"basis": "lgo"}]}}, "log"),
        ({"phi": {"terms": [{"basis": "tanh"}]}}, "tanh takes 1 numbers"),
        ({"g": {"terms": [{"basis": "square", "at": [-1.0]}]}}, "does not increase"),
        ({"phi": {"slope": 0.0, "terms": [{"basis": "log"}]}}, "phi.slope"),
        ({"lam_s": -1.0}, "lam_s"),
        ({"extra": 1}, "extra"),
    ],
    ids=["empty", "name", "numbers", "falls", "slope", "weight", "key"],
)
def test_wrong_files(tmp_path, change, message):
    whole = {"reference": False, "phi": {"terms": [{"basis": "log"}]}} | change
    (tmp_path / "a.json").write_text(json.dumps(whole))
    with pytest.raises(UsageError, match=message):
        mpo(shape="custom", coefficients=str(tmp_path / "a.json"))


def test_wrong_options(tmp_path):
    with pytest.raises(UsageError, match="custom needs a file"):
        mpo(shape="custom")
    with pytest.raises(UsageError, match="shape is dpo"):
        mpo(coefficients="x.json")
    with pytest.raises(UsageError, match="cannot be read"):
        mpo(shape="custom", coefficients=str(tmp_path / "none.json"))
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UsageError, match="JSON"):
        mpo(shape="custom", coefficients=str(tmp_path / "a.json"))


# --- what the losses mean -------------------------------------------------------------------------------------


def test_start():
    assert values(mpo(), at_reference(B)) == pytest.approx(np.log(2))


def test_reference_is_ignored_without_need():
    for shape in ("orpo", "cpo", "simper"):
        np.testing.assert_array_equal(values(mpo(shape=shape), B), values(mpo(shape=shape), ref_randomised(B)))
    assert mpo(shape="dpo", reference=False).needs == frozenset()
    np.testing.assert_allclose(values(mpo(reference=False, beta=0.4), B), softplus(-0.4 * A.m), rtol=1e-9)


def test_options_override_the_shape():
    np.testing.assert_allclose(values(mpo(probability="mean", beta=2.0), B), softplus(-2 * (A.Rw - A.Rl)), rtol=1e-9)
    np.testing.assert_allclose(values(mpo(lam_s=0.5, lam_p=3.0), B), 3 * softplus(-0.1 * A.h) - 0.5 * A.aw, rtol=1e-9)


def test_extremes():
    edge = of([-1e4, -1e-7, 0.0], [-1e-7, -1e4, 0.0], rw=[-1.0] * 3, rl=[-2.0] * 3)
    for shape in MEMBERS:
        assert np.isfinite(values(mpo(shape=shape), edge)).all()
        assert all(np.isfinite(g).all() for g in slopes(mpo(shape=shape), edge))


@pytest.mark.parametrize(("basis", "slope", "beta"), [("log", 2.0, 1.5), ("sqrt", np.sqrt(0.5), 8.0)])
def test_derived_reward(tmp_path, basis, slope, beta):
    """Exact Bradley-Terry labels: at the minimum ``φ(π) - φ(μ) = r/β + c(x)``, c from ``Σ π = 1`` by bisection."""
    rng = np.random.default_rng(4)
    reward, mu = rng.normal(size=(3, 4)), rng.dirichlet(np.ones(4) * 5, size=3)
    phi, back = {"log": (np.log, np.exp), "sqrt": (np.sqrt, np.square)}[basis]
    expected = []
    for r, m in zip(reward, mu, strict=True):
        low, high = -20.0, 20.0
        for _ in range(200):
            c = (low + high) / 2
            total = back(np.maximum(phi(m) + r / beta + c, 0.0 if basis == "sqrt" else -np.inf)).sum()
            low, high = (low, c) if total > 1 else (c, high)
        expected.append(back(phi(m) + r / beta + c))
        assert basis == "log" or (phi(m) + r / beta + c > 0).all()  # the interior regime
    shape = mirror.Shape(slope=float(slope), terms=(mirror.Term(basis=basis),))
    write(tmp_path / "a.json", mirror.Coefficients(reference=True, phi=shape))
    objective = mpo(shape="custom", coefficients=str(tmp_path / "a.json"), beta=beta)
    ref = torch.tensor(np.log(mu))

    def population(logp):
        b, x, w, l = all_pairs(logp, ref)  # noqa: E741
        return (torch.tensor(sig(reward[x, w] - reward[x, l])) * objective(b)[0]).sum() / len(x)

    found = minimised(population, ref)
    np.testing.assert_allclose(found.exp().numpy(), np.array(expected), atol=1e-6)
