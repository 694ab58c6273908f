"""Known preference losses as programs, and programs read back from losses (arXiv:2412.17696).

Probabilities of the atoms W, L, RW, RL are written ``pw pl rw rl``. What comes back is JSON-able. Derivations are as the
library's card gives them; "constrained" is the paper's best new loss (cCPO) as remembered.
"""

from collections.abc import Iterable
from typing import Any

from metier.core import formulas
from metier.core.errors import UsageError, unknown
from metier.core.formulas import Table
from metier.parts.objective._codes import atoms_of, compiled, decode, encode, entails, enumerate_codes, monotonicity

SYMBOLS = ("pw", "pl", "rw", "rl")
_OVER_REFERENCE = ("(RW and L) -> (RL and W)", "(RW and L) or (RL and W)", "RW and L and RL and W", "pw*rl/(rw*pl)")
KNOWN: dict[str, tuple[str, str, str, str]] = {
    "ce": ("W", "true", "false", "pw/(1-pw)"),
    "ce-unlikelihood": ("W and not L", "true", "false", "pw*(1-pl)/(1-pw*(1-pl))"),
    "cpo": ("L -> W", "W or L", "W and L", "pw/pl"),
    "orpo": ("L -> W", "W xor L", "false", "pw*(1-pl)/(pl*(1-pw))"),
    "implication": ("L -> W", "true", "false", "(1-pl*(1-pw))/(pl*(1-pw))"),
    "constrained": ("L -> W", "W or L", "false", "pw/(pl*(1-pw))"),
    "dpo": _OVER_REFERENCE,
    "simpo": _OVER_REFERENCE,
}
"""Name -> formula, condition, facts, ratio. ``simpo`` is the program of ``dpo`` with a reference set by hand:
``log rl/rw = -γ/β``."""


def code_of(name_or_code: str) -> str:
    """The code of a known program. Raises ``UsageError`` for another name."""
    if name_or_code in KNOWN:
        return compiled(*KNOWN[name_or_code][:3])
    if set(name_or_code) <= set("+-*."):
        decode(name_or_code)
        return name_or_code
    raise unknown("program", name_or_code, KNOWN)


def explain(name_or_code: str) -> dict[str, Any]:
    """A program in full: code, formulas (its own, or ``F- -> F+`` given ``F+ or F-`` with facts ``F+ and F-``), both sides,
    ratio, monotonicity, and the known programs that it entails or that entail it. JSON-able."""
    code = code_of(name_or_code)
    winner, loser = decode(code)
    atoms, n = atoms_of(code), len(atoms_of(code))
    plus, minus = (formulas.simplest(t, atoms) for t in (winner, loser))
    sides = [formulas.polynomial_text(formulas.polynomial(t, n), SYMBOLS[:n]) for t in (winner, loser)]
    either, both = (tuple(f((x, y)) for x, y in zip(winner, loser, strict=True)) for f in (any, all))
    known = {k: c for k in KNOWN if len(c := code_of(k)) == len(code)}
    name = name_or_code if name_or_code in KNOWN else next((k for k, c in known.items() if c == code), None)
    canonical = (
        f"({minus}) -> ({plus})",
        formulas.simplest(either, atoms),
        formulas.simplest(both, atoms),
        f"({sides[0]})/({sides[1]})",
    )
    formula, given, facts, ratio = KNOWN[name] if name else canonical
    return {
        "code": code, "name": name, "formula": formula, "given": given, "facts": facts, "winner": plus, "loser": minus,
        "ratio": ratio, "implication": canonical[0], **monotonicity(code), "reference": n == 4,
        "entails": [k for k, c in known.items() if c != code and entails(code, c)],
        "entailed_by": [k for k, c in known.items() if c != code and entails(c, code)],
    }  # fmt: skip


def decompile(text: str) -> dict[str, Any]:
    """The program of a ratio such as ``pw*(1-pl)/(pl*(1-pw))``; see :func:`explain`.

    Numerator and denominator must be weighted model counts: of degree one in each symbol, 0 or 1 at every corner.
    Raises ``UsageError`` that names the symbol or the corner where they are not.
    """
    ratio = formulas.parse_ratio(text, SYMBOLS)
    n = 4 if any(k[2] or k[3] for p in (ratio.top, ratio.bottom) for k in p) else 2
    tables = [_table(p, side, n) for p, side in ((ratio.top, "numerator"), (ratio.bottom, "denominator"))]
    return {**explain(encode(*tables)), "ratio": text}


def _table(p: formulas.Polynomial, side: str, n: int) -> Table:
    for exponents in p:
        for symbol, e in zip(SYMBOLS, exponents, strict=True):
            if e > 1:
                raise UsageError(f"the {side} has {symbol} to the power {e}", hint="No program says that: powers must be 0 or 1.")
    values = formulas.corners({k[:n]: c for k, c in p.items()}, n)
    for row, value in zip(formulas.rows(n), values, strict=True):
        if value not in (0, 1):
            corner = ", ".join(f"{s}={int(v)}" for s, v in zip(SYMBOLS, row, strict=False))
            hint = "Constants belong into reference symbols (rw, rl) that are set by hand."
            raise UsageError(f"the {side} is {value} at {corner}, where a program has 0 or 1", hint=hint)
    return tuple(value == 1 for value in values)


def lattice(codes: Iterable[str]) -> list[tuple[str, str]]:
    """Edges of the Hasse diagram of entailment between codes (or names): (stricter, next less strict)."""
    nodes = sorted({code_of(c) for c in codes})
    above = {a: {b for b in nodes if a != b and entails(a, b)} for a in nodes}
    return [(a, b) for a in nodes for b in sorted(above[a]) if not any(b in above[c] for c in above[a])]


def table(strict: bool = True) -> list[dict[str, Any]]:
    """:func:`explain` of every code, or of every strict one."""
    return [explain(code) for code in enumerate_codes(strict=strict)]
