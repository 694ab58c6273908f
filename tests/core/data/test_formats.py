"""Formats: recognition, conversion, and what is refused with which reason (F18, P9)."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.core.data.formats import (
    FORMATS,
    BadRow,
    Chat,
    Completion,
    Crossed,
    Judged,
    Labelled,
    Message,
    Preference,
    Prompted,
    Ranked,
    Text,
    convert,
    detect,
    examples,
    expand,
)
from metier.core.data.rows import Rows, open_rows
from metier.core.errors import UsageError

U, A, S = (lambda c, r=r: {"role": r, "content": c} for r in ("user", "assistant", "system"))
MU, MA, MS, MT = (lambda c, r=r: Message(r, c) for r in ("user", "assistant", "system", "tool"))
GRADED = {
    "question": "q",
    "ground_truth": "g",
    "m1": {"is_correct": True, "solution": "r1"},
    "m2": {"is_correct": False, "solution": "w1"},
    "m3": {"is_correct": True, "solution": "r2"},
    "m4": {"is_correct": False, "solution": "w2"},
}

# format -> (row, the example written by hand)
GOOD = [
    ("text", {"text": " a\n", "n": 3}, Text(" a\n")),
    ("messages", {"messages": [S("s"), U("u"), A("a")]}, Chat((MS("s"), MU("u"), MA("a")))),
    ("messages", {"messages": [U("u"), A("a"), {"role": "tool", "content": ""}, A("b")]},
     Chat((MU("u"), MA("a"), MT(""), MA("b")))),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "u"}]}, A("a")]},
     Chat((MU("u"), MA("a")))),
    ("messages", {"messages": [{"role": "user", "content": "u", "tool_calls": None}, A("a")]},
     Chat((MU("u"), MA("a")))),
    ("sharegpt", {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "u"},
     {"from": "gpt", "value": "a"}]}, Chat((MS("s"), MU("u"), MA("a")))),
    ("sharegpt", {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}],
     "system": "s"},
     Chat((MS("s"), MU("u"), MA("a")))),
    ("alpaca", {"instruction": "i", "input": "x", "output": "o"}, Completion("i\n\nx", "o")),
    ("alpaca", {"instruction": "i", "input": "", "output": "o"}, Completion("i", "o")),
    ("alpaca", {"instruction": "i", "output": "o", "system": "s"}, Completion((MS("s"), MU("i")), "o")),
    ("prompt-completion", {"prompt": "p", "completion": " c"}, Completion("p", " c")),
    ("prompt-completion", {"prompt": [S("s"), U("u")], "completion": [A("c")]},
     Completion((MS("s"), MU("u")), "c")),
    ("preference", {"prompt": "p", "chosen": "c", "rejected": "r"}, Preference("p", "c", "r")),
    ("preference", {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 2}, Preference("p", "c",
     "r", 2.0)),
    ("preference", {"prompt": [U("u")], "chosen": [A("c")], "rejected": [A("r")]}, Preference((MU("u"),),
     "c", "r")),
    ("preference", {"prompt": "u", "chosen": [U("u"), A("c")], "rejected": [U("u"), A("r")]},
     Preference((MU("u"),), "c", "r")),
    ("preference-implicit", {"chosen": [U("u"), A("x"), U("v"), A("c")],
     "rejected": [U("u"), A("x"), U("v"), A("r")],
     "score_chosen": 8.5, "score_rejected": 6}, Preference((MU("u"), MA("x"), MU("v")), "c", "r", 2.5)),
    ("preference-implicit", {"chosen": "\n\nHuman: hi\n\nAssistant: I am well",
     "rejected": "\n\nHuman: hi\n\nAssistant: I go"},
     Preference("\n\nHuman: hi\n\nAssistant:", " I am well", " I go")),
    ("preference-implicit", {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: yes d",
     "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: yes e"},
     Preference("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " yes d", " yes e")),
    ("preference-implicit", {"chosen": "One two cat", "rejected": "One two car"}, Preference("One two",
     " cat", " car")),
    ("preference-implicit", {"chosen": "Q: a b", "rejected": "Q: a b c"}, Preference("Q: a", " b", " b c")),
    ("unpaired", {"prompt": "p", "completion": "c", "label": True}, Judged("p", "c", True)),
    ("unpaired", {"prompt": [U("u")], "completion": [A("c")], "label": 0}, Judged((MU("u"),), "c", False)),
    ("unpaired", {"prompt": "p", "completion": "c", "label": "False"}, Judged("p", "c", False)),
    ("ranked", {"prompt": "p", "completions": ["a", "b"], "scores": [1, 0.5]}, Ranked("p", ("a",
     "b"), (1.0, 0.5))),
    ("preference", {"prompt": "p", "chosen": "c", "rejected": "r", "samples": ["s", "t"]},
     Preference("p", "c", "r", None, ("s", "t"))),
    ("prompts", {"prompt": "p"}, Prompted("p")),
    ("crossed", {"prompts": ["p", [U("q")]], "completions": ["a", "b"]}, Crossed(("p", (MU("q"),)), ("a", "b"))),
    ("classification", {"text": "t", "label": "1"}, Labelled("t", None, 1)),
    ("classification", {"text": "t", "pair": "u", "label": "good"}, Labelled("t", "u", "good")),
    ("classification", {"text": "t", "label": 2.0}, Labelled("t", None, 2)),
    ("question-answer", {"question": "q", "answer": "a"}, Completion("q", "a")),
    ("graded-solutions", GRADED, Preference("q", "r1", "w1")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "expected"), GOOD, ids=[f"{i}-{g[0]}" for i, g in enumerate(GOOD)])
def test_good_rows_convert_and_are_recognised(name, row, expected):
    found = convert(row, name, id="f:1")
    fields = {k: v for k, v in vars(found).items() if k not in ("id", "meta")}
    assert type(found) is type(expected)
    assert fields == {k: v for k, v in vars(expected).items() if k not in ("id", "meta")}
    assert found.id == "f:1"
    assert detect(Rows.of([row]))[0] == name


def test_every_format_is_tested():
    assert {g[0] for g in GOOD} == set(FORMATS)


def test_meta_holds_what_the_format_does_not_use():
    assert convert({"text": "t", "url": "u", "n": 1}, "text").meta == {"url": "u", "n": 1}
    assert convert(GRADED, "graded-solutions").meta == {"ground_truth": "g"}
    assert convert({"question": "q", "answer": "a", "n": 1}, "question-answer").meta == {"n": 1, "answer": "a"}
    pair = {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 1, "source": "x"}
    assert convert(pair, "preference").meta == {"source": "x"}


BAD = [
    ("text", {}, "'text' is missing"),
    ("text", {"txt": "a"}, "there is 'txt'"),
    ("text", {"text": None}, "'text' is null"),
    ("text", {"text": 3}, "text is the number 3, expected a string"),
    ("text", {"text": " \n"}, "text is empty"),
    ("messages", {"messages": []}, "messages is empty"),
    ("messages", {"messages": "hi"}, "messages is a string, expected a list"),
    ("messages", {"messages": [U("u")]}, "no assistant turn"),
    ("messages", {"messages": [U("a"), U("b")]}, "no assistant turn"),
    ("messages", {"messages": [S("a"), S("b"), A("c")]}, "2 system messages"),
    ("messages", {"messages": [U("a"), S("b"), A("c")]}, "messages[1] is a system message"),
    ("messages", {"messages": [U("a"), A("")]}, "messages[1] (assistant) is empty"),
    ("messages", {"messages": [U(None), A("a")]}, "messages[0] (user) is null"),
    ("messages", {"messages": [{"role": "usr", "content": "a"}]}, "did you mean 'user'"),
    ("messages", {"messages": [{"content": "a"}]}, "messages[0] has no 'role'"),
    ("messages", {"messages": ["a"]}, "messages[0] is a string"),
    ("messages", {"messages": [U("a"), {"role": "assistant", "tool_calls": [{}]}]}, "tool_calls"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "u"}]}, "no assistant turn"),
    ("sharegpt", {"conversations": [{"from": "system", "value": "s"}, {"from": "gpt", "value": "a"}],
     "system": "t"},
     "both 'system'"),
    ("alpaca", {"instruction": "i", "output": ""}, "output is empty"),
    ("alpaca", {"instruction": "i", "input": 3, "output": "o"}, "input is the number 3"),
    ("prompt-completion", {"prompt": [U("u"), A("a")], "completion": "c"}, "ends with an assistant turn"),
    ("prompt-completion", {"prompt": "p", "completion": [A("a"), U("b")]}, "expected one assistant message"),
    ("preference", {"prompt": "p", "chosen": "a", "rejected": "a "}, "chosen and rejected are equal"),
    ("preference", {"prompt": "p", "chosen": "", "rejected": "a"}, "chosen is empty"),
    ("preference", {"prompt": "p", "chosen": "b", "rejected": "a", "margin": float("nan")}, "margin is nan"),
    ("preference-implicit", {"chosen": "abc", "rejected": "xyz"}, "share no prompt"),
    ("preference-implicit", {"chosen": [A("c")], "rejected": [A("r")]}, "share no prompt"),
    ("preference-implicit", {"chosen": [U("u"), A("c")], "rejected": [U("u"), A("c")]}, "are equal"),
    ("preference-implicit", {"chosen": [U("u"), A("c"), U("x")], "rejected": [U("u"), A("r")]}, "2 messages"),
    ("unpaired", {"prompt": "p", "completion": "c", "label": 2},
     "label is the number 2, expected true or false"),
    ("ranked", {"prompt": "p", "completions": ["a", "b"], "scores": [1]}, "2 completions but 1 scores"),
    ("ranked", {"prompt": "p", "completions": ["a"], "scores": [1]}, "at least 2"),
    ("ranked", {"prompt": "p", "completions": ["a", "b"], "scores": [1, float("inf")]}, "scores[1] is inf"),
    ("ranked", {"prompt": "p", "completions": ["a", ""], "scores": [1, 2]}, "completions[1] is empty"),
    ("ranked", {"prompt": "p", "completions": "ab", "scores": [1, 2]},
     "completions is a string, expected a list"),
    ("classification", {"text": "t", "label": -1}, "label is -1"),
    ("classification", {"text": "t", "label": 0.5}, "label is the number 0.5"),
    ("classification", {"text": "t", "label": ""}, "label is empty"),
    ("question-answer", {"question": "q", "answer": ["a"]}, "answer is a list"),
    ("graded-solutions", {"question": "q", "m": {"is_correct": True, "solution": "a"}}, "1 graded solutions"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "reason"), BAD, ids=[f"{i}-{b[0]}" for i, b in enumerate(BAD)])
def test_bad_rows_give_their_reason(name, row, reason):
    with pytest.raises(BadRow) as e:
        convert(row, name)
    assert reason in str(e.value)


inner_keys = st.sampled_from(["role", "content", "from", "value", "is_correct", "solution", "text", "tool_calls"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(inner_keys, inner),
    max_leaves=8,
)
keys = sorted({k for f in FORMATS.values() for k in (*f.needs, *f.takes)})


@given(st.sampled_from(sorted(FORMATS)), st.dictionaries(st.sampled_from(keys), anything, max_size=5))
def test_any_row_converts_or_is_a_bad_row(name, row):
    """No other exception, and nothing empty or equal gets through."""
    try:
        found = expand(row, name)
    except BadRow:
        return
    for e in found:
        texts = [v for k, v in vars(e).items() if k in ("text", "completion", "chosen", "rejected")]
        assert all(isinstance(t, str) and t.strip() for t in texts)
        assert not isinstance(e, Preference) or e.chosen.strip() != e.rejected.strip()
        assert not isinstance(e, Chat) or any(m.role == "assistant" for m in e.messages)


words = st.text("ab \n", min_size=1, max_size=12)


@given(words, words)
def test_implicit_prompt_and_answers_rebuild_the_strings(a, b):
    try:
        e = convert({"chosen": a, "rejected": b}, "preference-implicit")
    except BadRow:
        return
    assert e.prompt + e.chosen == a
    assert e.prompt + e.rejected == b


# --- several solutions ------------------------------------------------------------------------------------


def test_each_right_solution_meets_one_wrong_one_in_turn():
    found = expand(GRADED, "graded-solutions", id="f:7")
    assert [(e.chosen, e.rejected, e.id) for e in found] == [("r1", "w1", "f:7"), ("r2", "w2", "f:7+1")]
    one_wrong = {k: v for k, v in GRADED.items() if k != "m4"}
    assert [(e.chosen, e.rejected) for e in expand(one_wrong, "graded-solutions")] == [
        ("r1", "w1"),
        ("r2", "w1"),
    ]


def test_rows_without_a_pair_are_left_out_and_counted():
    right = {k: v for k, v in GRADED.items() if k not in ("m2", "m4")}
    said = []
    found = examples(Rows.of([right, GRADED, right], "g"), notice=said.append)
    assert [e.id for e in found] == ["g:2", "g:2+1"]
    assert said[-1] == "g: 2 of 3 rows have no pair to compare and are left out"
    with pytest.raises(UsageError, match="no row gives an example"):
        examples(Rows.of([right]))
    with pytest.raises(BadRow, match="nothing to compare"):
        convert(right, "graded-solutions")


# --- recognition ------------------------------------------------------------------------------------------


def test_recognition_is_said():
    said = []
    examples(Rows.of([{"question": "q", "answer": "a"}], "t.jsonl"), notice=said.append)
    assert said == ["t.jsonl: format question-answer (a question and its answer), from the keys answer, question"]


def test_a_few_bad_rows_do_not_hide_the_format():
    rows = Rows.of([{"oops": 1}, {"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": 0}])
    assert detect(rows)[0] == "classification"


def test_recognition_looks_beyond_the_beginning():
    """Fifty rows of another kind at the start must not decide for a thousand."""
    rows = Rows.of([{"text": "a"}] * 50 + [{"question": "q", "answer": "a"}] * 1000)
    assert detect(rows)[0] == "question-answer"


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (
            {"instructon": "a", "output": "b"},
            ["instructon, output", "alpaca", "columns: {instruction: instructon}"],
        ),
        ({"sentence": "a", "label": 1}, ["label, sentence", "classification", "columns: {text:"]),
        ({"foo": 1, "bar": 2}, ["bar, foo", "Nearest format"]),
        ({}, ["(none)"]),
        (
            {"text": "a", "messages": [U("u"), A("a")]},
            ["fit text and messages", "format: text or format: messages"],
        ),
        ({"question": "q"}, ["Nearest format: question-answer"]),
    ],
)
def test_unclear_rows_are_an_error_with_the_keys_and_the_nearest_format(row, parts):
    with pytest.raises(UsageError) as e:
        detect(Rows.of([row]))
    for part in parts:
        assert part in str(e.value)


def test_unknown_format_names_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'sharegpt'"):
        examples(Rows.of([{"text": "a"}]), "sharegtp")


# --- all bad rows at once (P9) ----------------------------------------------------------------------------


def test_all_bad_rows_are_reported_with_place_reason_and_total(tmp_path):
    path = tmp_path / "chat.jsonl"
    good = {"messages": [U("u"), A("a")]}
    rows = [good] * 20 + [{"messages": []}, {"messages": [S("a"), S("b"), A("c")]}, {"massages": []}] + [{}] * 9
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UsageError) as e:
        examples(open_rows(str(path)))
    message = str(e.value)
    assert "12 of 32 rows cannot be used" in message
    assert "chat.jsonl row 21: messages is empty" in message
    assert "chat.jsonl row 22: messages has 2 system messages" in message
    assert "chat.jsonl row 23: 'messages' is missing (there is 'massages')" in message
    assert message.count("\n") == 11  # ten rows and the number of the others
    assert "and 2 more" in message
    assert e.value.exit_code == 2
    with pytest.raises(UsageError) as e:
        examples(open_rows(str(path)), limit_errors=3)
    assert "and 9 more" in str(e.value)


def test_ids_are_file_and_line(tmp_path):
    (tmp_path / "t.jsonl").write_text('\n{"text": "a", "id": 5}\n{"text": "b", "id": 5}\n')
    found = examples(open_rows(str(tmp_path / "t.jsonl")))
    assert [e.id for e in found] == ["t.jsonl:2", "t.jsonl:3"]
    assert found[0].meta == {"id": 5}


@pytest.mark.real
def test_real_files(shared_data):
    solutions = examples(open_rows(str(shared_data / "gsm8k-model-solutions.jsonl")))
    raw = [json.loads(line) for line in (shared_data / "gsm8k-model-solutions.jsonl").open()]
    graded = [[v for v in r.values() if isinstance(v, dict)] for r in raw]
    mixed = [g for g in graded if 0 < sum(v["is_correct"] for v in g) < len(g)]
    assert len({e.id.split("+")[0] for e in solutions}) == len(mixed)
    assert len(solutions) == sum(len({v["solution"] for v in g if v["is_correct"]}) for g in mixed)
    right = {(r["question"], v["solution"]): v["is_correct"] for r in raw for v in r.values() if isinstance(v, dict)}
    assert all(right[e.prompt, e.chosen] and not right[e.prompt, e.rejected] for e in solutions)
    sst2 = examples(open_rows(str(shared_data / "sst2-dev.tsv"), columns={"text": "sentence"}))
    assert {e.label for e in sst2} == {0, 1}
