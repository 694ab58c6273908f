"""Arithmetic: is the last number of an answer the right one? (GSM8K's verifier, arXiv:2110.14168.)"""

import re
from fractions import Fraction

import torch
from torch import Tensor

from metier.core.errors import UsageError
from metier.core.part import NonNegative, part

DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
NUMBER = re.compile(
    rf"(?<![\w./])(?P<sign>[-−+]?)\s?(?P<money>[$€£¥]?)\s?(?P<inner>[-−]?)"
    rf"(?:(?P<mixed>\d+)\s+(?P<mtop>\d+)/(?P<mbottom>\d+)|(?P<top>{DIGITS})\s?/\s?(?P<bottom>{DIGITS})"
    rf"|(?P<plain>{DIGITS}(?:\.\d+)?|\.\d+))(?P<exponent>[eE][-+]?\d+)?(?P<percent>\s?%)?"
)
LONGEST = 400
"""Characters of a number; longer ones are noise, and Python refuses to convert very long ones."""
MARKS = (re.compile(r"####\s*([^\n#]+)"), re.compile(r"\\boxed\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"))
"""Where an answer may be marked; the last mark counts before the last number of the text."""


@part("reward/arithmetic", paper="arXiv:2110.14168")
def arithmetic(
    prompts: list[str],
    completions: list[list[str]],
    answers: list[str] | None,
    *,
    correct: float = 1.0,
    wrong: float = 0.0,
    tolerance: NonNegative = 0.0,
) -> Tensor:
    """``correct`` where the completion's final number equals the answer's, else ``wrong``; ``[P, K]``.

    Final is what stands behind the last ``#### …`` or in the last ``\\boxed{…}``, else the last number.
    Numbers may have signs, thousands commas, decimals, exponents, currency or percent signs (``50%`` is 50),
    and be fractions, also mixed ones. They are compared exactly, or within ``tolerance`` (absolute). Raises
    ``UsageError`` without answers, or for an answer that holds no number.
    """
    if answers is None:
        raise UsageError("reward/arithmetic needs the right answers", hint="Use question-answer data.")
    rewards = torch.full((len(prompts), max(map(len, completions), default=0)), float(wrong))
    for i, (prompt, written, answer) in enumerate(zip(prompts, completions, answers, strict=True)):
        truth = final_number(answer)
        if truth is None:
            raise UsageError(f"the answer {answer[-60:]!r} holds no number", where=f"prompt {prompt[:40]!r}")
        for k, text in enumerate(written):
            found = final_number(text)
            if found is not None and abs(found - truth) <= tolerance:
                rewards[i, k] = correct
    return rewards


def final_number(text: str) -> Fraction | None:
    """The number that a solution ends in, or ``None``."""
    for mark in MARKS:
        marked = mark.findall(text)
        if marked:
            return next(iter(numbers(_plain(marked[-1]))), None)
    return next(reversed(numbers(_plain(text))), None)


def numbers(text: str) -> list[Fraction]:
    """All numbers of a text, in order."""
    return [n for m in NUMBER.finditer(text) if (n := _value(m)) is not None]


def _plain(text: str) -> str:
    r"""LaTeX fractions and spacing as plain text: ``\frac{1}{2}`` -> ``1/2``, ``1{,}000`` -> ``1,000``."""
    text = re.sub(r"\\[dt]?frac\{\s*(-?\d+)\s*\}\{\s*(\d+)\s*\}", r" \1/\2", text)
    return text.replace("{,}", ",").replace(r"\!", "").replace("\\$", "$").replace("\\%", "%")


def _value(m: re.Match[str]) -> Fraction | None:
    def whole(digits: str) -> Fraction:
        return Fraction(digits.replace(",", ""))

    g = m.groupdict()
    if m.end() - m.start() > LONGEST:
        return None
    if any(g[k] is not None and not whole(g[k]) for k in ("mbottom", "bottom")):
        return None
    if g["mixed"] is not None:
        value = whole(g["mixed"]) + whole(g["mtop"]) / whole(g["mbottom"])
    elif g["top"] is not None:
        value = whole(g["top"]) / whole(g["bottom"])
    else:
        value = whole(g["plain"])
    # Python would happily compute 10 ** 999999999.
    exponent = int(g["exponent"][1:]) if g["exponent"] else 0
    if abs(exponent) > 400:
        return None
    negative = (g["sign"] in ("-", "−")) != bool(g["inner"])
    return (-value if negative else value) * Fraction(10) ** exponent
