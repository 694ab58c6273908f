"""The report over all rows, against counts done by hand."""

import json

import pytest

from metier.core.data.check import check_rows
from metier.core.data.readers import Problems
from metier.core.data.rows import Rows, open_rows
from metier.core.errors import UsageError


def test_counts_labels_lengths_and_duplicates():
    texts = [("aa", 0), ("aaaa", 1), ("aa", 0), ("aa", 1), ("a" * 100, "x")]
    report = check_rows(Rows.of([{"text": t, "label": y, "id": i // 2} for i, (t, y) in enumerate(texts)], "t"))
    assert (report.rows, report.examples, report.duplicates) == (5, 5, 1)
    assert report.labels == {"0": 2, "1": 2, "x": 1}
    assert report.lengths == {"text": {"min": 2, "median": 2, "p95": 100, "max": 100}}
    assert report.duplicate_ids == {"0": 2, "1": 2}
    assert report.ok


def test_every_problem_is_listed_and_unread_rows_come_with_them(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\nbad\n' + '{"text": ""}\n' * 30)
    unread = Problems(keep=None)
    report = check_rows(open_rows(str(path), problems=unread), problems=unread)
    assert report.format == "text"
    assert (report.rows, report.examples, len(report.problems)) == (32, 1, 31)
    assert report.problems[0][0] == "t.jsonl row 2"
    assert report.problems[-1] == ("t.jsonl row 32", "text is empty")
    assert not report.ok
    assert json.loads(json.dumps(report.json()))["problems"][1] == {
        "where": "t.jsonl row 3",
        "reason": "text is empty",
    }


def test_lengths_of_messages_and_lists():
    chat = {"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]}
    assert check_rows(Rows.of([chat])).lengths == {"messages": {"min": 5, "median": 5, "p95": 5, "max": 5}}
    ranked = {"prompt": "p", "completions": ["a", "bbb"], "scores": [1, 2]}
    assert check_rows(Rows.of([ranked])).lengths["completions"]["max"] == 3
    judged = {"prompt": "p", "completion": "c", "label": True}
    assert check_rows(Rows.of([judged])).labels == {"true": 1}


def test_rows_with_nothing_to_compare_are_no_problem_but_not_enough():
    solved = {"question": "q", **{m: {"is_correct": True, "solution": m} for m in ("a", "b")}}
    report = check_rows(Rows.of([solved]))
    assert (report.barren, report.problems, report.ok) == (1, [], False)


def test_unknown_format():
    with pytest.raises(UsageError, match="unknown format"):
        check_rows(Rows.of([{"text": "a"}]), "txt")
