"""Oracle of reward/arithmetic: solutions and the number a reader would say they end in.

Bugs it is meant to catch: the first number instead of the last, commas read as separate numbers, lost signs,
floats compared as floats, a sentence's full stop taken for a decimal point, digits of words.
"""

from fractions import Fraction

import pytest
import torch

from metier.core import part
from metier.core.errors import UsageError
from metier.testing import check_part

CASES = [
    ("so 3 + 4 = 7", 7), ("The answer is 7.", 7), ("7, as required", 7), ("1,234,567 people", 1234567),
    ("first 3, then 5", 5), ("It costs $1,250.50.", Fraction("1250.5")), ("-3", -3), ("it fell to -$3", -3),
    ("it fell to $-3", -3), ("x=−4", -4), ("x = - 4", -4), ("10-3", 3), ("5 - 3 = 2", 2),
    ("a total of 50%", 50), ("1/2", Fraction(1, 2)), ("2 1/4 cups", Fraction(9, 4)),
    ("-1/3", Fraction(-1, 3)), ("0.1", Fraction(1, 10)), (".5", Fraction(1, 2)), ("1e3", 1000),
    ("2.5e-2", Fraction(1, 40)), ("x2 = 8 and GPT4", 8), ("3/0 is bad", None), ("18\n#### 18", 18),
    ("work 99\n#### -1,000\n", -1000), ("#### 5 apples and 6 pears", 5), ("#### 4 then #### 6", 6),
    (r"so \boxed{42} because 7", 42), (r"\boxed{\frac{3}{4}}", Fraction(3, 4)), (r"\boxed{1{,}000}", 1000),
    (r"\boxed{x = \$12}", 12), ("#### no idea", None), ("#### about 3km", 3), ("nothing", None), ("", None),
    ("1e999999999", None), ("007", 7), ("12,34", 34), ("(15)", 15), ("**15**", 15), ("€20", 20),
    ("30 %", 30), ("12 dollars.", 12), ("10:30", 30), ("+8", 8), ("1000000", 1000000), ("1,2,3", 3),
]  # fmt: skip


def reward(**options):
    return part.build("reward", {"arithmetic": options}).obj


def test_contract():
    check_part("reward/arithmetic")


@pytest.mark.parametrize(("text", "number"), CASES)
def test_final_number(text, number):
    from metier.parts.reward.arithmetic import final_number

    assert final_number(text) == number


def test_rewards():
    got = reward()(["q1", "q2"], [["so 0.30", "3"], ["1/3", "0.333"]], ["0.1 + 0.2 = 0.3", "#### 1/3"])
    assert got.tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_options():
    got = reward(correct=2.0, wrong=-1.0, tolerance=0.01)(["q"], [["0.333", "0.4", "?"]], ["1/3"])
    assert got.tolist() == [[2.0, -1.0, -1.0]]


def test_ragged_completions_are_padded_with_wrong():
    assert reward()(["a", "b"], [["1"], ["1", "2"]], ["1", "2"]).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_refusals():
    with pytest.raises(UsageError, match="right answers"):
        reward()(["q"], [["1"]], None)
    with pytest.raises(UsageError, match="no number"):
        reward()(["q"], [["1"]], ["none"])


def test_hostile_text_is_fast():
    import time

    began = time.monotonic()
    got = reward()(["q"], [["1," * 20000, "1 " * 20000 + "/", "\\boxed{" * 5000, "-" * 50000, "9" * 5000]], ["1"])
    assert time.monotonic() - began < 2
    assert torch.isfinite(got).all()


@pytest.mark.real
def test_gsm8k_answers_all_parse():
    import json
    from pathlib import Path

    path = Path(__file__).parents[4] / "shared" / "data" / "gsm8k-train.jsonl"
    if not path.is_file():
        pytest.skip("no GSM8K beside the checkout")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    answers = [r["answer"] for r in rows]
    assert reward()([r["question"] for r in rows], [[a] for a in answers], answers).min() == 1
