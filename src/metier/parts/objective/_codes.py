"""Codes of preference programs: what a program is, which is stricter, which are monotone (arXiv:2412.17696).

Atoms: W and L, "the model accepts the chosen (rejected) answer", RW and RL the same of the reference. A program is a
formula P with a condition C (``given``) and facts A: ``F+ = (P or A) and C`` wins over ``F- = (not P or A) and C``, and the
loss is a function of ``ρ = log Pr(F+) / Pr(F-)``.

A code has a sign per row of the truth table over (W, L) or (W, L, RW, RL): ``+`` in F+ only, ``-`` in F- only, ``*`` in both,
``.`` in neither. Programs of equal code are the same loss.
"""

from itertools import product

from metier.core import formulas
from metier.core.errors import UsageError
from metier.core.formulas import Table

ATOMS = ("W", "L", "RW", "RL")
SIGNS = {(True, False): "+", (False, True): "-", (True, True): "*", (False, False): "."}


def atoms_of(code: str) -> tuple[str, ...]:
    """The atoms of a code, by its length."""
    return ATOMS if len(code) == 16 else ATOMS[:2]


def encode(winner: Table, loser: Table) -> str:
    """The code of the tables of F+ and F-."""
    return "".join(SIGNS[pair] for pair in zip(winner, loser, strict=True))


def decode(code: str, where: str | None = None) -> tuple[Table, Table]:
    """Tables of F+ and F-. Raises ``UsageError`` for what is no code, or one whose loss says nothing."""
    if len(code) not in (4, 16) or set(code) - set("+-*."):
        raise UsageError(f"{code!r} is no code", where=where, hint="A code is 4 or 16 of the signs + - * .")
    winner, loser = tuple(c in "+*" for c in code), tuple(c in "-*" for c in code)
    if not any(winner) or not any(loser) or winner == loser:
        empty = "" if any(winner) and any(loser) else "F-" if any(winner) else "F+"
        reason = f"nothing satisfies {empty}" if empty else "F+ and F- are the same"
        raise UsageError(f"the program {code} prefers nothing: {reason}", where=where)
    return winner, loser


def compiled(formula: str, given: str = "true", facts: str = "false", where: str | None = None) -> str:
    """The code of a program, over four atoms if it names RW or RL. Raises ``UsageError`` when it prefers nothing."""
    used = formulas.names(f"{formula} {given} {facts}")
    atoms = ATOMS if used & {"RW", "RL"} else ATOMS[:2]
    p, c, a = (formulas.parse(t, atoms if used <= set(atoms) else ATOMS, where=where) for t in (formula, given, facts))
    cells = list(zip(p, c, a, strict=True))
    code = encode(tuple((x or z) and y for x, y, z in cells), tuple((not x or z) and y for x, y, z in cells))
    decode(code, where)
    return code


def lift(code: str) -> str:
    """The program of ``ρ(policy) - ρ(reference)``, over four atoms. Raises ``UsageError`` if it has a reference already."""
    if len(code) != 4:
        raise UsageError(f"{code} reads the reference already", hint="Only programs over W and L can be lifted.")
    cells = list(product(zip(*decode(code), strict=True), repeat=2))
    return encode(tuple(p[0] and r[1] for p, r in cells), tuple(p[1] and r[0] for p, r in cells))


def entails(first: str, second: str) -> bool:
    """``F1+ implies F2+`` and ``F2- implies F1-``: then ``ρ1 <= ρ2`` for all probabilities, so the first loss is never
    below the second. The converse does not hold. Programs over two and over four atoms are not compared."""
    if len(first) != len(second):
        return False
    (win1, lose1), (win2, lose2) = decode(first), decode(second)
    return formulas.implies(win1, win2) and formulas.implies(lose2, lose1)


def enumerate_codes(*, strict: bool = False, monotone: bool = False) -> list[str]:
    """The codes over W and L that prefer something (210 of ``4^4``), or the monotone (52) or strict (34) ones of them."""
    found = []
    for code in map("".join, product("+-*.", repeat=4)):
        wins, loses = (sum(c in s for c in code) for s in ("+*", "-*"))
        if wins and loses and set(code) & set("+-"):
            seen = monotonicity(code)
            if (seen["strict"] or not strict) and (seen["monotone"] or not monotone):
                found.append(code)
    return found


def monotonicity(code: str) -> dict[str, bool | None]:
    """``monotone``: ρ nowhere falls with ``pw`` nor rises with ``pl``; ``strict``: it rises and falls everywhere inside.

    Exact over two atoms. Over four, ``None`` where the test (signs of Bernstein coefficients) does not decide.
    """
    up, down = _slope(code, 0), _slope(code, 1, -1)
    return {key: None if None in (a, b) and False not in (a, b) else bool(a and b)
            for key, a, b in (("monotone", up[0], down[0]), ("strict", up[1], down[1]))}  # fmt: skip


def _slope(code: str, atom: int, sign: int = 1) -> tuple[bool | None, bool | None]:
    """Is ``∂ρ/∂p`` of an atom, times ``sign``, nowhere negative inside the cube; and everywhere positive?

    It has the sign of ``N1 D0 - N0 D1``, with N and D at ``p = 0`` and 1: of degree two in each other probability, here by
    Bernstein coefficients (times the binomials) with degrees ``k``.
    """
    sides = [dict(zip(formulas.rows(len(atoms_of(code))), t, strict=True)) for t in decode(code)]
    at = [[{r[:atom] + r[atom + 1 :]: v for r, v in t.items() if r[atom] is b} for b in (False, True)] for t in sides]
    (n0, n1), (d0, d1) = at
    found: dict[tuple[int, ...], int] = {}
    for u, v in product(n0, repeat=2):
        k = tuple(int(x) + int(y) for x, y in zip(u, v, strict=True))
        found[k] = found.get(k, 0) + sign * (n1[u] * d0[v] - n0[u] * d1[v])
    if all(c >= 0 for c in found.values()):
        return True, any(found.values())
    # a quadratic with a negative middle coefficient and corners 0 or 1 dips below 0: for corners 1 and 1 the middle is positive
    if len(found) == 3 or any(c < 0 for k, c in found.items() if 1 not in k):
        return False, False
    return None, None
