"""probe/condorcet: tables of wins from rows, pairs, lists and judges.

Bugs it is meant to catch: wins of the row counted for the column, prompts mixed, a judge asked in one order, ties as wins.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.errors import UsageError
from metier.testing import check_part
from metier.testing.probe import tiny_probe


def probed(where, **options):
    return part.build("probe", {"condorcet": {"data": where, **options}}).obj(tiny_probe())


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def test_contract():
    check_part("probe/condorcet")


CYCLE = [[0, 8, 2], [2, 0, 8], [8, 2, 0]]
ORDER = [[0, 9, 9], [1, 0, 9], [1, 1, 0]]


def test_tables_of_wins(tmp_path):
    rows = [{"prompt": "cycle", "completions": ["r", "p", "s"], "wins": CYCLE}, {"prompt": "order", "wins": ORDER}]
    found = probed(write(tmp_path / "wins.jsonl", rows))
    assert found["matrices"] == 2
    assert found["cyclic"] == found["no_winner"] == found["representable"] == 0.5
    cycle, order = found["rows"]
    assert (cycle["cycles"], cycle["winner"], cycle["smith"]) == (1, None, [0, 1, 2])
    assert cycle["nash"] == pytest.approx([1 / 3] * 3)
    assert cycle["rewards"] == pytest.approx([0] * 3, abs=1e-6)
    assert cycle["residual"] == pytest.approx(1.0)
    assert cycle["worst_of_first"] == pytest.approx(0.2)
    assert cycle["worst_of_nash"] == pytest.approx(0.5)
    assert (order["winner"], order["loser"], order["smith"], order["cyclic"]) == (0, 2, [0], False)
    assert order["nash"] == pytest.approx([1, 0, 0])
    assert np.argsort(order["rewards"]).tolist() == [2, 1, 0]
    assert order["names"] == ["0", "1", "2"]
    assert len(probed(write(tmp_path / "wins.jsonl", rows), shown=1)["rows"]) == 1


def test_what_was_never_compared_needs_no_explanation(tmp_path):
    """a beats b as b beats c; nothing is known of a and c, and rewards explain all that is known."""
    rows = [{"prompt": "chain", "wins": [[0, 9, 0], [1, 0, 9], [0, 1, 0]]}]
    (chain,) = probed(write(tmp_path / "w.jsonl", rows))["rows"]
    assert chain["residual"] == pytest.approx(0, abs=1e-12)
    assert chain["compared"] == pytest.approx(2 / 3)
    np.testing.assert_allclose(chain["rewards"], np.log(9) * np.array([1, 0, -1]), atol=1e-2)


def test_right_answers_reach_the_judge(tmp_path):
    row = {"prompt": "2 + 2?", "completions": ["it is 5", "it is 4"], "scores": [1.0, 0.0], "answer": "4"}
    (seen,) = probed(write(tmp_path / "l.jsonl", [row]), judge="arithmetic")["rows"]
    assert seen["winner"] == 1


@pytest.mark.parametrize("takes", [True, False])
def test_conversations_reach_judges_that_read_them(tmp_path, monkeypatch, takes):
    """In both orders of every pair; a judge that takes texts is given the text."""

    def longer(prompts, completions, answers):
        asked.extend(prompts)
        return torch.tensor([[float(len(c)) for c in row] for row in completions])

    longer.takes_messages, asked = takes, []
    monkeypatch.setattr("metier.parts.probe.condorcet.build", lambda kind, ref: SimpleNamespace(obj=longer))
    prompt = [{"role": "system", "content": "S"}, {"role": "user", "content": "u"}]
    where = write(tmp_path / "l.jsonl", [{"prompt": prompt, "completions": ["a", "aaa", "aa"], "scores": [3.0, 1.0, 2.0]}])
    (seen,) = probed(where, judge="length")["rows"]
    assert (seen["winner"], seen["loser"]) == (1, 0)
    assert len(asked) == 6
    assert all((type(p) is tuple and [m.role for m in p] == ["system", "user"]) if takes else "u" in p for p in asked)


def test_pairs_are_counted_by_prompt(tmp_path):
    beats = [("a", "b")] * 3 + [("b", "a")] + [("b", "c")] * 2 + [("c", "a")] * 2
    rows = [{"prompt": "x", "chosen": w, "rejected": x} for w, x in beats] + [{"prompt": "y", "chosen": "a", "rejected": "c"}]
    found = probed(write(tmp_path / "pairs.jsonl", rows))
    x, y = found["rows"]
    assert x["answers"] == 3
    assert x["cyclic"]
    assert x["compared"] == 1
    assert y["answers"] == 2
    assert y["winner"] == y["names"].index("a")


def test_names_over_all_prompts(tmp_path):
    rows = [
        {"prompt": f"p{i}", "chosen": f"x{i}", "rejected": f"y{i}", "model_chosen": w, "model_rejected": x}
        for i, (w, x) in enumerate([("m", "n"), ("n", "o"), ("o", "m"), ("m", "m")])
    ]
    found = probed(write(tmp_path / "models.jsonl", rows), over="model")
    assert found["matrices"] == 1
    assert found["cyclic"] == 1
    with pytest.raises(UsageError, match="two compared answers"):
        probed(write(tmp_path / "models.jsonl", rows), over="team")


def test_lists_by_scores_and_by_judges(tmp_path):
    rows = [{"prompt": "x", "completions": ["a a a", "a", "a a"], "scores": [0.1, 0.2, 0.2]}]
    where = write(tmp_path / "lists.jsonl", rows)
    (plain,) = probed(where)["rows"]
    assert plain["winner"] is None
    assert plain["loser"] == 0
    assert plain["representable"]  # a tie of two is a tie of the reward
    (judged,) = probed(where, judge="length")["rows"]
    assert judged["winner"] == 0
    assert judged["residual"] == pytest.approx(0, abs=1e-6)
    file = tmp_path / "judge.py"
    file.write_text(
        "P = {('a', 'a a'): 0.7, ('a a', 'a a a'): 0.7, ('a a a', 'a'): 0.7}\n"
        "def prefer(prompts, completions, answers):\n"
        "    return [[(P.get((a, b)) or 1 - P[b, a]) + 0.2, 0.0] for a, b in completions]\n"
    )
    (cyclic,) = probed(where, judge={"python": {"function": f"{file}:prefer"}}, pairwise=True)["rows"]
    assert cyclic["cyclic"]
    assert cyclic["nash"] == pytest.approx([1 / 3] * 3)
    assert cyclic["worst_of_first"] == pytest.approx(0.3)  # the bonus of 0.2 for the first place is gone


@pytest.mark.parametrize(
    "row",
    [
        {"wins": "many"},
        {"wins": [[0, 1]]},
        {"wins": [[0, -1], [1, 0]]},
        {"wins": [[0, 1], [1, 0]], "completions": ["a"]},
        {"wins": [[0]]},
    ],
    ids=str,
)
def test_unusable_tables_are_refused(tmp_path, row):
    with pytest.raises(UsageError):
        probed(write(tmp_path / "w.jsonl", [{"prompt": "x", **row}]))


def test_no_pairs_at_all():
    with pytest.raises(UsageError, match="no preference pairs"):
        part.build("probe", "condorcet").obj(tiny_probe())
