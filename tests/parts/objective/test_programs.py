"""Programs: the counts that the card states, round trips, entailment against numbers, hand-written truth tables.

Bugs it is meant to catch: winner and loser exchanged, rows in another order, facts or condition dropped, a reversed entailment,
a corner that is not 0 or 1 accepted, edges of the lattice that follow from others.
"""

import json
from itertools import product

import numpy as np
import pytest

from metier.core.errors import UsageError
from metier.parts.objective import _programs as programs
from metier.parts.objective._codes import compiled, decode, lift, monotonicity

CODES = programs.enumerate_codes()
TABLE = {
    "ce": "++--", "ce-unlikelihood": "-+--", "cpo": "*+-.", "orpo": ".+-.", "implication": "++-+", "constrained": "++-.",
}  # fmt: skip


def counts(code, pw, pl):
    """Numerator and denominator, from the signs."""
    cells = (pw * pl, pw * (1 - pl), (1 - pw) * pl, (1 - pw) * (1 - pl))
    return tuple(sum(x for c, x in zip(code, cells, strict=True) if c in signs) for signs in ("+*", "-*"))


def test_counts():
    assert len(list(product("+-*.", repeat=4))) == 256
    assert (len(CODES), len(set(CODES))) == (210, 210)
    assert len(programs.enumerate_codes(monotone=True)) == 52
    strict = programs.enumerate_codes(strict=True)
    assert len(strict) == 34
    assert set(TABLE.values()) <= set(strict) | {"++--"}
    assert len(programs.table(strict=True)) == 34


def test_monotonicity_numerically():
    """Signs of finite differences of ρ on a fine grid."""
    p = np.linspace(0.001, 0.999, 83)
    pw, pl = p[:, None], p[None, :]
    for code in CODES:
        with np.errstate(divide="ignore", invalid="ignore"):
            top, bottom = (np.broadcast_to(x, (83, 83)) for x in counts(code, pw, pl))
        rho = np.log(top) - np.log(bottom)
        up, down = np.diff(rho, axis=0), -np.diff(rho, axis=1)
        seen = monotonicity(code)
        assert seen["monotone"] == bool((up > -1e-12).all() and (down > -1e-12).all()), code
        assert seen["strict"] == bool((up > 1e-12).all() and (down > 1e-12).all()), code


def test_known_codes():
    for name, code in TABLE.items():
        assert programs.code_of(name) == code
        assert programs.explain(code)["name"] == name
    assert programs.code_of("dpo") == programs.code_of("simpo") == lift("*+-.")


def test_known_ratios():
    """Each name's ratio, decompiled, is its program."""
    for name, (formula, given, facts, ratio) in programs.KNOWN.items():
        assert programs.decompile(ratio)["code"] == compiled(formula, given, facts)
        assert programs.explain(name)["name"] == name


@pytest.mark.parametrize("code", CODES)
def test_round_trip(code):
    """Code -> ratio -> code, and code -> implication form -> code; the ratio's value is that of the signs."""
    seen = programs.explain(code)
    assert json.loads(json.dumps(seen)) == seen
    top, bottom = programs.formulas.parse_ratio(seen["ratio"], programs.SYMBOLS).__dict__.values()
    for p, expected in zip((top, bottom), counts(code, 0.3, 0.8), strict=True):
        found = sum(float(c) * np.prod([x**e for x, e in zip((0.3, 0.8, 1, 1), k, strict=True)]) for k, c in p.items())
        if seen["name"] is None:
            assert found == pytest.approx(expected, abs=1e-12)
    assert programs.decompile(seen["ratio"])["code"] == code
    assert compiled(seen["formula"], seen["given"], seen["facts"]) == code
    unnamed = [seen["implication"], f"({seen['winner']}) or ({seen['loser']})", f"({seen['winner']}) and ({seen['loser']})"]
    assert compiled(*unnamed) == code


def test_four_atoms():
    """DPO by hand: the winner's rows have W and RL, the loser's L and RW."""
    seen = programs.decompile("(pw/rw) / (pl/rl)")
    assert (seen["name"], seen["winner"], seen["loser"], seen["reference"]) == ("dpo", "W and RL", "L and RW", True)
    signs = {(True, True): "*", (True, False): "+", (False, True): "-", (False, False): "."}
    rows = product((True, False), repeat=4)
    assert seen["code"] == "".join(signs[(w and rl, m and rw)] for w, m, rw, rl in rows)
    assert (seen["monotone"], seen["strict"]) == (True, True)


def test_lift():
    """Numerator ``N(p) D(r)``: of ORPO's odds ratio with a reference."""
    seen = programs.decompile("pw*(1-pl)*rl*(1-rw) / (pl*(1-pw)*rw*(1-rl))")
    assert seen["code"] == lift(".+-.")
    with pytest.raises(UsageError, match="reference already"):
        lift(seen["code"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pw*pw/pl", "numerator has pw to the power 2"),
        ("2*pw/pl", "numerator is 2 at pw=1, pl=1"),
        ("pw/(pl-pw)", "denominator is -1 at pw=1, pl=0"),
        ("pw/(pl+pw)", "denominator is 2 at pw=1, pl=1"),
        ("pw/pw", "F\\+ and F- are the same"),
        ("pw/0", "nothing satisfies F-"),
        ("0/pw", "nothing satisfies F\\+"),
        ("pw/ql", "ql"),
        ("pw/", "unexpected the end"),
    ],
)
def test_what_is_no_program(text, message):
    with pytest.raises(UsageError, match=message):
        programs.decompile(text)


def test_wrong_names_and_codes():
    with pytest.raises(UsageError, match="cpo"):
        programs.explain("cop")
    for code in ("++-", "+" * 5, ""):
        with pytest.raises(UsageError, match="no code"):
            programs.explain(code)
    with pytest.raises(UsageError, match="no code"):
        decode("ab+-")
    with pytest.raises(UsageError, match="prefers nothing"):
        programs.explain("++..")


def test_entailment():
    """3680 pairs, each in numerical order on 1000 points; some pairs in numerical order are not entailed."""
    p = np.random.default_rng(0).random((2, 1000))
    rho = {c: np.log(counts(c, *p)[0]) - np.log(counts(c, *p)[1]) for c in CODES}
    pairs = {(a, b) for a in CODES for b in CODES if a != b and programs.entails(a, b)}
    assert len(pairs) == 3680
    assert all((rho[a] <= rho[b] + 1e-9).all() for a, b in pairs)
    others = [(a, b) for a in CODES for b in CODES if a != b and (a, b) not in pairs]
    against = sum(bool((rho[a] > rho[b] + 1e-9).any()) for a, b in others)
    assert len(others) == 40210
    assert 0.91 < against / len(others) < 0.93


def test_entailment_of_known_losses():
    """The card: ORPO and CPO both entail "constrained" and are not comparable."""
    assert programs.entails(".+-.", "++-.")
    assert programs.entails("*+-.", "++-.")
    assert not programs.entails(".+-.", "*+-.")
    assert not programs.entails("*+-.", ".+-.")
    assert not programs.entails("*+-.", lift("*+-."))
    assert programs.explain("cpo")["entails"] == ["implication", "constrained"]
    assert set(programs.explain("constrained")["entailed_by"]) >= {"cpo", "orpo"}


def test_lattice():
    """The edges give back all of entailment, and none of them follows from two others."""
    codes = programs.enumerate_codes(strict=True)
    edges = programs.lattice(codes)
    reach = {c: {b for a, b in edges if a == c} for c in codes}
    for _ in codes:
        reach = {c: r | {y for x in r for y in reach[x]} for c, r in reach.items()}
    assert {(a, b) for a in codes for b in reach[a]} == {
        (a, b) for a in codes for b in codes if a != b and programs.entails(a, b)
    }
    assert not any((a, c) in edges and (b, c) in edges for a, b in edges for c in codes)
    assert programs.lattice(["cpo", "orpo", "constrained"]) == [("*+-.", "++-."), (".+-.", "++-.")]
