"""Propositional formulas and rational functions of a few named atoms: parsed, tabulated, counted, simplified.

A *table* holds the truth values of a formula on all ``2^n`` assignments to ``n`` atoms, the first atom slowest and true
before false: for ``(A, B)`` the rows TT, TF, FT, FF. Two formulas mean the same when their tables are equal.
Where each atom is true with its own probability, independently of the others, the probability of a formula is its
*weighted model count*: the sum, over the assignments that satisfy it, of the product of the probabilities of what they say.
It is a polynomial of degree at most one in each probability, and its values at the corners of the unit cube are the table.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, product
from typing import Generic, TypeVar

import torch
from torch import Tensor

from metier.core.errors import UsageError, unknown
from metier.core.preferences import log1mexp

Table = tuple[bool, ...]
Polynomial = dict[tuple[int, ...], Fraction]
"""Exponents of the atoms -> coefficient; no coefficient is zero."""
Cube = tuple[bool | None, ...]
"""A conjunction: per atom true, false, or not in it."""
LEAST = 1e-6
"""Log-probabilities are kept below minus this, so that ``log(1 - p)`` stays finite."""
T = TypeVar("T")


# --- one parser for both languages ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Grammar(Generic[T]):
    """A language of infix expressions: what its words and signs mean."""

    word: Callable[[str], T]
    """Value of a name or number; raises ``UsageError`` for one that means nothing."""
    prefix: Mapping[str, tuple[int, Callable[[T], T]]]
    """Sign -> how tightly it binds, and what it does."""
    infix: Mapping[str, tuple[int, Callable[[T, T], T]]]
    rightmost: frozenset[str] = frozenset()
    """Infix signs that group from the right."""


class _Parser(Generic[T]):
    """Precedence climbing over one text."""

    def __init__(self, text: str, grammar: Grammar[T], where: str | None) -> None:
        self.text, self.grammar, self.where = text, grammar, where
        self.tokens = [(m.group(), m.start()) for m in re.finditer(r"->|\w+|\S", text)]
        self.at = 0

    def whole(self) -> T:
        try:
            value = self.expression(0)
        except RecursionError:
            raise UsageError(f"{self.text[:40]!r}… is nested too deeply", where=self.where) from None
        if self.at < len(self.tokens):
            raise self.unexpected()
        return value

    def peek(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1][0]

    def expression(self, least: int) -> T:
        value = self.operand()
        while (sign := self.peek()) in self.grammar.infix:
            binds, apply = self.grammar.infix[sign]
            if binds < least:
                break
            self.take()
            value = apply(value, self.expression(binds if sign in self.grammar.rightmost else binds + 1))
        return value

    def operand(self) -> T:
        if (sign := self.peek()) in self.grammar.prefix:
            binds, apply = self.grammar.prefix[self.take()]
            return apply(self.expression(binds))
        if sign == "(":
            self.take()
            value = self.expression(0)
            if self.peek() != ")":
                raise self.unexpected("')'")
            self.take()
            return value
        if not re.fullmatch(r"\w+", sign) or sign in self.grammar.infix:
            raise self.unexpected("a name")
        return self.grammar.word(self.take())

    def unexpected(self, wanted: str = "") -> UsageError:
        sign = self.peek()
        found = f"{sign!r} at character {self.tokens[self.at][1] + 1}" if sign else "the end"
        return UsageError(f"{self.text!r}: unexpected {found}" + (f", expected {wanted}" if wanted else ""), where=self.where)


# --- formulas ------------------------------------------------------------------------------------------------


def rows(n: int) -> list[Table]:
    """All assignments to n atoms, in the order of a table."""
    return list(product((True, False), repeat=n))


def parse(text: str, atoms: Sequence[str], *, where: str | None = None) -> Table:
    """The table of a formula over ``atoms``: ``not``, ``and``, ``xor``, ``or``, ``->`` (from tightest to loosest),
    parentheses, ``true``, ``false``.

    Raises ``UsageError`` for a text that is no formula or names another atom.
    """
    columns = {a: tuple(r[i] for r in rows(len(atoms))) for i, a in enumerate(atoms)}
    columns |= {"true": (True,) * 2 ** len(atoms), "false": (False,) * 2 ** len(atoms)}

    def word(name: str) -> Table:
        if name not in columns:
            raise unknown("atom", name, columns, where=where)
        return columns[name]

    def each(f: Callable[[bool, bool], bool]) -> Callable[[Table, Table], Table]:
        return lambda a, b: tuple(f(x, y) for x, y in zip(a, b, strict=True))

    infix = {
        "->": (1, each(lambda x, y: not x or y)), "or": (2, each(lambda x, y: x or y)),
        "xor": (3, each(lambda x, y: x != y)), "and": (4, each(lambda x, y: x and y)),
    }  # fmt: skip
    return _Parser(text, Grammar(word, {"not": (5, negation)}, infix, frozenset(["->"])), where).whole()


def names(text: str) -> set[str]:
    """The words of a formula that are not signs or constants."""
    return set(re.findall(r"\w+", text)) - {"not", "and", "xor", "or", "true", "false"}


def negation(table: Table) -> Table:
    """The table of ``not F``."""
    return tuple(not x for x in table)


def implies(a: Table, b: Table) -> bool:
    """Whether every assignment that satisfies the first satisfies the second."""
    return all(y or not x for x, y in zip(a, b, strict=True))


def log_count(table: Table, logp: Tensor) -> Tensor:
    """Log of the weighted model count, ``[B]``, from log-probabilities of the atoms ``[B, n]``.

    ``log Σ_rows exp Σ_i (log p_i or log(1 - p_i))``; log-probabilities are kept below ``-1e-6``, beyond which they
    have no gradient. The table must have a true row.
    """
    logp = logp.clamp(max=-LEAST)
    both = torch.stack([log1mexp(logp), logp], dim=-1)  # [B, n, false/true]
    true = [row for row, held in zip(rows(logp.shape[1]), table, strict=True) if held]
    picked = [torch.stack([both[:, i, int(v)] for i, v in enumerate(row)]).sum(0) for row in true]
    return torch.stack(picked, dim=-1).logsumexp(-1)


# --- simplest form -------------------------------------------------------------------------------------------


def simplest(table: Table, atoms: Sequence[str]) -> str:
    """A shortest disjunction of conjunctions with this table (Quine 1952, McCluskey 1956), as text for :func:`parse`.

    Fewest conjunctions, then fewest atoms; an equal table always gives an equal text. Tries all covers by prime
    implicants, which is quick for four atoms and less.
    """
    wanted = {row for row, held in zip(rows(len(atoms)), table, strict=True) if held}
    if len(wanted) in (0, len(table)):
        return "true" if wanted else "false"
    primes = _primes(wanted, len(atoms))
    for count in range(1, len(primes) + 1):
        covers = [c for c in combinations(primes, count) if all(any(_within(row, p) for p in c) for row in wanted)]
        if covers:
            best = min(covers, key=lambda c: sum(_size(p) for p in c))
            return " or ".join(_conjunction(p, atoms, alone=count == 1) for p in sorted(best, key=_reading))
    raise AssertionError("all prime implicants together cover the table")


def _within(row: Table, cube: Cube) -> bool:
    return all(c is None or c == v for v, c in zip(row, cube, strict=True))


def _size(cube: Cube) -> int:
    return sum(c is not None for c in cube)


def _primes(wanted: set[Table], n: int) -> list[Cube]:
    """The largest cubes inside a set of rows."""
    cubes = list(product((None, True, False), repeat=n))
    inside = [c for c in cubes if all(row in wanted for row in rows(n) if _within(row, c))]

    def larger(c: Cube, d: Cube) -> bool:
        return c != d and all(y is None or x == y for x, y in zip(c, d, strict=True))

    return [c for c in inside if not any(larger(c, d) for d in inside)]


def _reading(cube: Cube) -> list[int]:
    """Sorts conjunctions by their first atom, affirmed ones first."""
    return [2 if c is None else int(not c) for c in cube]


def _conjunction(cube: Cube, atoms: Sequence[str], *, alone: bool) -> str:
    text = " and ".join(a if v else f"not {a}" for a, v in zip(atoms, cube, strict=True) if v is not None)
    return text if alone or _size(cube) == 1 else f"({text})"


# --- polynomials ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """A quotient of two polynomials, as written: nothing is cancelled."""

    top: Polynomial
    bottom: Polynomial

    def __add__(self, other: "Ratio") -> "Ratio":
        if self.bottom == other.bottom:
            return Ratio(_sum(self.top, other.top), self.bottom)
        crossed = _sum(_times(self.top, other.bottom), _times(other.top, self.bottom))
        return Ratio(crossed, _times(self.bottom, other.bottom))

    def __neg__(self) -> "Ratio":
        return Ratio({k: -c for k, c in self.top.items()}, self.bottom)

    def __sub__(self, other: "Ratio") -> "Ratio":
        return self + -other

    def __mul__(self, other: "Ratio") -> "Ratio":
        return Ratio(_times(self.top, other.top), _times(self.bottom, other.bottom))

    def __truediv__(self, other: "Ratio") -> "Ratio":
        return Ratio(_times(self.top, other.bottom), _times(self.bottom, other.top))


def _sum(a: Polynomial, b: Polynomial) -> Polynomial:
    found = {k: a.get(k, Fraction()) + b.get(k, Fraction()) for k in a | b}
    return {k: c for k, c in found.items() if c}


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    found: Polynomial = {}
    for (ka, ca), (kb, cb) in product(a.items(), b.items()):
        found = _sum(found, {tuple(x + y for x, y in zip(ka, kb, strict=True)): ca * cb})
    return found


def parse_ratio(text: str, symbols: Sequence[str], *, where: str | None = None) -> Ratio:
    """A rational function such as ``a*(1-b)/(1-a*b)`` of ``symbols``; ``+ - * /``, whole numbers and parentheses.

    Raises ``UsageError`` for anything else.
    """
    none = (0,) * len(symbols)
    one: Polynomial = {none: Fraction(1)}
    units = {s: tuple(int(j == i) for j in range(len(symbols))) for i, s in enumerate(symbols)}

    def word(name: str) -> Ratio:
        if name.isdecimal():
            return Ratio(_sum({none: Fraction(int(name))}, {}), one)
        if name not in units:
            raise unknown("symbol", name, symbols, where=where)
        return Ratio({units[name]: Fraction(1)}, one)

    infix = {"+": (1, Ratio.__add__), "-": (1, Ratio.__sub__), "*": (2, Ratio.__mul__), "/": (2, Ratio.__truediv__)}
    return _Parser(text, Grammar(word, {"-": (2, Ratio.__neg__)}, infix), where).whole()


def corners(p: Polynomial, n: int) -> list[Fraction]:
    """Values of a polynomial at the corners of the unit cube, in the order of a table."""
    return [sum((c for k, c in p.items() if all(v or not e for e, v in zip(k, row, strict=True))), Fraction()) for row in rows(n)]


def polynomial(table: Table, n: int) -> Polynomial:
    """The weighted model count of a table as a polynomial in the atoms' probabilities."""
    found: Polynomial = {}
    for row in (r for r, held in zip(rows(n), table, strict=True) if held):
        wrong = [i for i, v in enumerate(row) if not v]
        for size in range(len(wrong) + 1):
            for extra in combinations(wrong, size):
                exponents = tuple(int(v or i in extra) for i, v in enumerate(row))
                found = _sum(found, {exponents: Fraction((-1) ** size)})
    return found


def polynomial_text(p: Polynomial, symbols: Sequence[str]) -> str:
    """A polynomial as text for :func:`parse_ratio`, lowest powers first."""
    out = ""
    for exponents, c in sorted(p.items(), key=lambda kc: (sum(kc[0]), [-e for e in kc[0]])):
        factors = [s for s, e in zip(symbols, exponents, strict=True) for _ in range(e)]
        if abs(c) != 1 or not factors:
            factors.insert(0, str(abs(c)))
        sign = ("-" if c < 0 else "") if not out else (" - " if c < 0 else " + ")
        out += sign + "*".join(factors)
    return out or "0"
