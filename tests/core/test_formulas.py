"""Formulas against Python's own operators, sympy's minimal forms, and brute-force sums in exact fractions.

Bugs it is meant to catch: precedence, grouping of ``->``, row order, a negated literal counted as positive, a cover that is not
minimal, signs of the expanded polynomial, a denominator squared by adding fractions.
"""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch

from metier.core import formulas
from metier.core.errors import UsageError

ATOMS = ("A", "B", "C")
GRID = list(product((True, False), repeat=3))


def table(f):
    return tuple(bool(f(*row)) for row in GRID)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("A", lambda a, b, c: a),
        ("not A and B", lambda a, b, c: (not a) and b),
        ("A or B and C", lambda a, b, c: a or (b and c)),
        ("A xor B or C", lambda a, b, c: (a != b) or c),
        ("A xor B and C", lambda a, b, c: a != (b and c)),
        ("A -> B -> C", lambda a, b, c: (not a) or (not b) or c),
        ("(A -> B) -> C", lambda a, b, c: not ((not a) or b) or c),
        ("A or B -> C", lambda a, b, c: not (a or b) or c),
        ("not (A or not B)", lambda a, b, c: not (a or not b)),
        ("not not C", lambda a, b, c: c),
        ("true xor A", lambda a, b, c: not a),
        ("false", lambda a, b, c: False),
        ("A->B", lambda a, b, c: (not a) or b),
    ],
    ids=[f"formula {i}" for i in range(13)],
)
def test_tables(text, meaning):
    assert formulas.parse(text, ATOMS) == table(meaning)


def test_row_order():
    assert formulas.rows(2) == [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A and", "unexpected the end, expected a name"),
        ("(A or B", r"expected '\)'"),
        ("A B", "unexpected 'B' at character 3"),
        ("A & B", "unexpected '&' at character 3"),
        ("", "unexpected the end"),
        ("and A", "unexpected 'and' at character 1"),
        ("A or D", "D"),
        ("(" * 3000 + "A" + ")" * 3000, "nested too deeply"),
    ],
    ids=["end", "open", "two", "sign", "empty", "operator", "unknown", "deep"],
)
def test_errors(text, message):
    with pytest.raises(UsageError, match=message):
        formulas.parse(text, ATOMS)


def test_names():
    assert formulas.names("(A and not B) -> (true xor RW)") == {"A", "B", "RW"}


def test_implies_and_negation():
    a, b = formulas.parse("A and B", ATOMS), formulas.parse("A", ATOMS)
    assert formulas.implies(a, b)
    assert not formulas.implies(b, a)
    assert formulas.negation(a) == formulas.parse("not A or not B", ATOMS)


def brute(rows, p):
    """Σ Π in NumPy."""
    return sum(np.prod([q if v else 1 - q for q, v in zip(p, row, strict=True)]) for row in rows)


def test_log_count():
    rng = np.random.default_rng(0)
    for _ in range(50):
        held = tuple(rng.random(8) < 0.5)
        if not any(held):
            continue
        p = rng.random((4, 3)) * 0.98 + 0.01
        expected = [np.log(brute([r for r, h in zip(GRID, held, strict=True) if h], q)) for q in p]
        found = formulas.log_count(held, torch.tensor(np.log(p)))
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-12)


def test_log_count_at_the_ends():
    logp = torch.tensor([[0.0, -1e5], [-1e5, 0.0], [-1e-9, -1e-9], [-1e5, -1e5]], requires_grad=True)
    for code in range(1, 16):
        held = tuple(bool(code >> i & 1) for i in range(4))
        value = formulas.log_count(held, logp)
        (slope,) = torch.autograd.grad(value.sum(), logp)
        assert torch.isfinite(value).all()
        assert torch.isfinite(slope).all()
    # 1 - exp(-1e-6): the clamp
    value = formulas.log_count((False, False, True, True), logp)[0].item()
    assert value == pytest.approx(np.log(1e-6), abs=1e-4)


def test_simplest_is_equal_and_minimal():
    sympy = pytest.importorskip("sympy")
    symbols = sympy.symbols("A B C")
    for number in range(256):
        held = tuple(bool(number >> i & 1) for i in range(8))
        text = formulas.simplest(held, ATOMS)
        assert formulas.parse(text, ATOMS) == held
        if 0 < sum(held) < 8:
            minterms = [[int(v) for v in row] for row, h in zip(GRID, held, strict=True) if h]
            form = sympy.logic.SOPform(symbols, minterms)
            terms = form.args if isinstance(form, sympy.Or) else (form,)
            literals = sum(len(t.args) if isinstance(t, sympy.And) else 1 for t in terms)
            assert len(text.split(" or ")) <= len(terms)
            if len(text.split(" or ")) == len(terms):
                assert sum(text.count(a) for a in ATOMS) <= literals


def test_simplest_by_hand():
    two = ("W", "L")
    assert formulas.simplest((True, True, False, True), two) == "W or not L"
    assert formulas.simplest((False, True, True, False), two) == "(W and not L) or (not W and L)"
    assert formulas.simplest((True,) * 4, two) == "true"
    assert formulas.simplest((False,) * 4, two) == "false"


def exactly(p, at):
    total = Fraction(0)
    for exponents, c in p.items():
        term = c
        for e, x in zip(exponents, at, strict=True):
            term *= x**e
        total += term
    return total


def test_ratio_values():
    at = (Fraction(1, 3), Fraction(2, 7))
    a, b = at
    cases = {
        "a*(1-b)/(b*(1-a))": a * (1 - b) / (b * (1 - a)),
        "1 - a - b": 1 - a - b,
        "1-(a-b)": 1 - a + b,
        "-a*b + 3": 3 - a * b,
        "a/b/2": a / b / 2,
        "(a/(1-b)) / (b/(1-a))": a * (1 - a) / (b * (1 - b)),
        "1/(1-a) + b/(1-a)": (1 + b) / (1 - a),
        "a + b/(1-a)": a + b / (1 - a),
        "2*a - a - a + 1": Fraction(1),
    }
    for text, expected in cases.items():
        r = formulas.parse_ratio(text, ("a", "b"))
        assert exactly(r.top, at) / exactly(r.bottom, at) == expected, text
    assert formulas.parse_ratio("1/(1-a) + b/(1-a)", ("a", "b")).bottom == {(0, 0): 1, (1, 0): -1}  # not squared


def test_ratio_errors():
    with pytest.raises(UsageError, match="c"):
        formulas.parse_ratio("a*c", ("a", "b"))
    with pytest.raises(UsageError, match="'>' at character 2"):
        formulas.parse_ratio("a>b", ("a", "b"))
    with pytest.raises(UsageError, match="unexpected"):
        formulas.parse_ratio("exp(a)", ("exp", "a"))


def test_polynomial_of_a_table():
    rng = np.random.default_rng(1)
    for _ in range(40):
        held = tuple(bool(x) for x in rng.random(8) < 0.5)
        p = formulas.polynomial(held, 3)
        at = tuple(Fraction(int(x), 97) for x in rng.integers(1, 96, 3))
        rows = [r for r, h in zip(GRID, held, strict=True) if h]
        expected = sum((np.prod([x if v else 1 - x for x, v in zip(at, row, strict=True)]) for row in rows), Fraction(0))
        assert exactly(p, at) == expected
        assert [bool(c) for c in formulas.corners(p, 3)] == list(held)
        text = formulas.polynomial_text(p, ("x", "y", "z"))
        assert formulas.parse_ratio(text, ("x", "y", "z")).top == p


def test_polynomial_text():
    assert formulas.polynomial_text({}, ("x",)) == "0"
    assert formulas.polynomial_text(formulas.polynomial((True, True, False, True), 2), ("w", "l")) == "1 - l + w*l"
    assert formulas.polynomial_text({(0,): Fraction(-2), (2,): Fraction(3)}, ("x",)) == "-2 + 3*x*x"
