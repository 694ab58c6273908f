"""Oracle of core/data/pipeline: what a run file's ``data`` section becomes, and how wrong data are refused.

Bugs it is meant to catch: held-out examples also trained on, a split that changes between runs, classes shifted when labels do
not count from 0, two inputs with equal names mistaken for each other, eval settings without effect.
"""

import json
from pathlib import Path

import pytest
import torch

from metier.core import config, models
from metier.core.data.budget import token_budget
from metier.core.data.pipeline import open_data
from metier.core.engine import Engine
from metier.core.errors import UsageError
from metier.core.resolve import resolve

ENGINE = Engine(torch.device("cpu"), "fp32", "ddp")


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def opened(train, *, objective="lm", notices=None, **data):
    run, document = config.load(
        {"model": "lab/llama-50k", "objective": objective, "data": {"train": train, **data}, "train": {"steps": 3, "batch": 4}}
    )
    return open_data(resolve(run, document), ENGINE, notice=(notices if notices is not None else []).append)


def encoded(found, task="lm", num_labels=2):
    bundle = models.load("lab/llama-50k", task=task, num_labels=num_labels)
    return bundle, *found.encode(bundle)


def texts(n):
    return [{"text": f"This is text number {i}, and it has some words."} for i in range(n)]


def labelled(*labels):
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "a.jsonl", texts(40))


# --- formats and objectives ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "rows", "message"), [
    ("dpo", texts(3), "objective/dpo reads preference examples, but a.jsonl holds text examples"),
    ("classify", texts(3), "objective/classify reads labelled examples, but a.jsonl holds text examples"),
    ("lm", labelled(0, 1), "objective/lm reads text or chat or completion examples, but a.jsonl holds labelled examples"),
])  # fmt: skip
def test_the_wrong_format_for_an_objective(tmp_path, objective, rows, message):
    with pytest.raises(UsageError, match=message) as e:
        opened(write(tmp_path / "a.jsonl", rows), objective=objective)
    assert "data.train" in e.value.where


def test_the_place_of_wrong_held_out_data_is_eval(tmp_path, file):
    with pytest.raises(UsageError, match="holds labelled") as e:
        opened(file, eval=write(tmp_path / "b.jsonl", labelled(0, 1)))
    assert "data.eval" in e.value.where


def test_chunk_is_for_plain_text(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}] * 3
    with pytest.raises(UsageError, match=r"data\.chunk is for plain text"):
        opened(write(tmp_path / "a.jsonl", rows), chunk=True)


def test_packed_classification_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"data\.packed"):
        opened(write(tmp_path / "a.jsonl", labelled(0, 1)), objective="classify", packed=True)


def test_what_was_detected_is_said(file):
    notices = []
    opened(file, notices=notices)
    assert any("format text" in n for n in notices)


def test_margins_of_some_pairs_only_are_not_used(tmp_path):
    rows = [{"prompt": "q", "chosen": "a", "rejected": f"b{i}", **({"margin": 1.0} if i else {})} for i in range(3)]
    notices = []
    found = opened(write(tmp_path / "a.jsonl", rows), objective="dpo", notices=notices)
    assert [e.margin for e in found.train["train"]] == [None] * 3
    assert any("only 2 of 3 pairs have a margin" in n for n in notices)
    found = opened(write(tmp_path / "b.jsonl", rows[1:]), objective="dpo")
    assert [e.margin for e in found.train["train"]] == [1.0, 1.0]


def test_lists_of_ties_only_make_no_pairs(tmp_path):
    rows = [{"prompt": "q", "completions": ["a", "b"], "scores": [1.0, 1.0]}] * 3
    with pytest.raises(UsageError, match="nothing to learn from"):
        opened(write(tmp_path / "a.jsonl", rows), objective="dpo")


def test_a_mixture_has_margins_everywhere_or_nowhere(tmp_path):
    """Held-out rows count for themselves: their batches are never joined with those of training."""
    bare = [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 2
    with_margin, without = write(tmp_path / "a.jsonl", [{**r, "margin": 1.0} for r in bare]), write(tmp_path / "b.jsonl", bare)
    found = opened({"a": with_margin, "b": without}, objective="dpo", source={"mix": {}})
    assert [e.margin for part in found.train.values() for e in part] == [None] * 4
    found = opened(with_margin, objective="dpo", eval=without)
    assert [e.margin for e in found.train["train"]] == [1.0, 1.0]
    assert [e.margin for e in found.held_out] == [None, None]


# --- held-out data -------------------------------------------------------------------------------------------


def test_a_fraction_is_held_out_the_same_for_every_run(file):
    first, second = (opened(file, eval_fraction=0.25) for _ in range(2))
    assert len(first.held_out) == 10
    assert first.held_out == second.held_out
    ids = {e.id for e in first.train["train"]}
    assert len(ids) == 30
    assert ids.isdisjoint(e.id for e in first.held_out)
    assert [int(e.id.split(":")[1]) for e in first.held_out] != list(range(31, 41))


def test_pairs_of_one_row_stay_on_one_side(tmp_path):
    rows = [
        {"question": f"q{i}", **{f"s{k}": {"is_correct": k < 3, "solution": f"{i} {k}"} for k in range(4)}} for i in range(10)
    ]
    found = opened(write(tmp_path / "a.jsonl", rows), objective="dpo", eval_fraction=0.3)
    assert (len(found.held_out), len(found.train["train"])) == (9, 21)
    assert {e.prompt for e in found.held_out}.isdisjoint(e.prompt for e in found.train["train"])


def test_a_separate_file_goes_before_a_fraction(tmp_path, file):
    found = opened(file, eval=write(tmp_path / "b.jsonl", texts(5)), eval_fraction=0.5)
    assert (len(found.train["train"]), len(found.held_out)) == (40, 5)


@pytest.mark.parametrize(("limit", "number"), [(None, 300), (64, 64), (300, 300), (1000, 300)])
def test_eval_limit(tmp_path, file, limit, number):
    """A sample, not the beginning: files are often sorted."""
    other = write(tmp_path / "b.jsonl", texts(300))
    _, _, held = encoded(opened(file, eval=other, eval_limit=limit))
    ids = [i for layout in held for i in layout.ids]
    assert len(set(ids)) == len(ids) == number
    if number == 64:
        assert max(int(i.split(":")[1]) for i in ids) > 200


def test_limit_is_for_training_only(tmp_path, file):
    found = opened(file, eval=write(tmp_path / "b.jsonl", texts(5)), limit=3)
    assert (len(found.train["train"]), len(found.held_out)) == (3, 5)


def test_too_few_rows(tmp_path):
    one = write(tmp_path / "a.jsonl", texts(1))
    with pytest.raises(UsageError, match="only 1 rows: none is left to train on"):
        opened(one, eval_fraction=0.1)


@pytest.fixture
def splits(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", texts(8))
    write(folder / "validation.jsonl", texts(3))
    return str(folder)


def test_eval_split(splits, file):
    found = opened(splits, split="train", eval_split="validation")
    assert {e.id.split(":")[0] for e in found.train["train"]} == {"set/train.jsonl"}
    assert {e.id.split(":")[0] for e in found.held_out} == {"set/validation.jsonl"}
    assert (len(found.train["train"]), len(found.held_out)) == (8, 3)
    assert len(opened(file, eval=splits, eval_split="validation").held_out) == 3
    assert len(opened(splits, split="train", eval=file, eval_split="validation").held_out) == 40


@pytest.mark.parametrize("where", ["file", "lab/pydoc"])
def test_a_file_has_no_splits(file, where):
    with pytest.raises(UsageError, match=r"eval_split = 'validation', but .* has no splits") as e:
        opened(file if where == "file" else where, eval_split="validation")
    assert "data.eval=FILE" in e.value.hint


# --- text in blocks ------------------------------------------------------------------------------------------

BOOK = "".join(f"This is line {i} of a long book.\n" for i in range(400))


def test_the_end_of_one_long_text_is_held_out(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(BOOK, encoding="utf-8")
    found = opened(str(path), chunk=True, eval_fraction=0.1, max_length=32)
    (kept,), (held,) = found.train["train"], found.held_out
    assert kept.text + held.text == BOOK
    assert kept.text.endswith("book.\n")
    assert len(held.text) / len(BOOK) == pytest.approx(0.1, abs=0.01)
    assert held.id == "book.txt tail"
    _, loader, layouts = encoded(found)
    assert all(len(i.prompt) == 32 for i in loader.items)
    assert sum(len(x.ids) for x in layouts) > 5
    other = opened(str(path), chunk=True, eval_fraction=0.3, max_length=32)
    assert len(encoded(other)[1].items) < len(loader.items)  # blocks are remembered per fraction


def test_enough_texts_are_held_out_whole(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(f"{i}\n{BOOK}", encoding="utf-8")
    found = opened(str(tmp_path), chunk=True, eval_fraction=0.1)
    assert len(found.held_out) == 2
    assert not any(e.id.endswith("tail") for e in found.held_out)


def test_a_text_of_one_line_has_no_end_to_hold_out(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text(BOOK.replace("\n", " "), encoding="utf-8")
    with pytest.raises(UsageError, match="no lines"):
        opened(str(path), chunk=True, eval_fraction=0.1)


def test_texts_shorter_than_a_block(tmp_path):
    with pytest.raises(UsageError, match="shorter than one block"):
        encoded(opened(write(tmp_path / "a.jsonl", texts(2)), chunk=True, max_length=1000))


def test_blocks(file):
    _, loader, _ = encoded(opened(file, chunk=True, max_length=16))
    assert {len(i.prompt) for i in loader.items} == {16}
    assert loader.tokens_per_step == 16 * 4


# --- several inputs ------------------------------------------------------------------------------------------


def test_several_inputs_need_a_source(file):
    with pytest.raises(UsageError, match="several inputs need a source"):
        opened({"a": file, "b": file})


def test_files_of_the_same_name_have_different_ids(tmp_path):
    where = {}
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        where[name] = write(tmp_path / name / "rows.jsonl", texts(10))
    found = opened(where, source="mix", eval_fraction=0.2)
    assert found.train["x"][0].id.startswith("x/rows.jsonl:")
    ids = [e.id for part in (*found.train.values(), found.held_out) for e in part]
    assert len(set(ids)) == len(ids) == 20
    assert len(found.held_out) == 4
    assert opened({"x": where["x"]}).train["x"][0].id == "rows.jsonl:1"


def test_a_source_gives_the_loader_a_stream(file):
    _, loader, held = encoded(opened({"a": file, "b": file}, source="mix", eval_fraction=0.1))
    assert loader.length is None
    assert loader.tokens_per_step > 0
    assert held
    assert len(next(iter(loader)).ids) == 4
    _, loader, _ = encoded(opened({"a": file, "b": file}, source="mix", chunk=True, max_length=1000))
    assert loader.tokens_per_step == 4000  # though 50 texts do not fill a block


def test_options_of_a_source_are_part_of_the_data(file):
    prints = [
        opened({"a": file, "b": file}, source={"mix": {"weights": w}}).fingerprint for w in ({"a": 1, "b": 1}, {"a": 1, "b": 2})
    ]
    assert [k for k in prints[0] if prints[0][k] != prints[1][k]] == ["source"]
    json.dumps(prints)


# --- fingerprint ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "named"), [
    ({"max_length": 50}, ["max_length"]), ({"chunk": True}, ["chunk"]), ({"eval_fraction": 0.5}, ["eval_fraction"]),
    ({"truncate": "right"}, ["truncate"]), ({"shuffle": False}, ["shuffle"]), ({"limit": 10}, ["train"]), ({"packed": True}, []),
    ({"eval_limit": 3}, []),
], ids=str)  # fmt: skip
def test_fingerprint(file, change, named):
    then, now = opened(file).fingerprint, opened(file, **change).fingerprint
    assert [k for k in then if then[k] != now[k]] == named


def test_fingerprint_of_tokenizer_and_template(file):
    found = opened(file)
    encoded(found)
    assert {"tokenizer", "template"} <= set(found.fingerprint)


# --- labels --------------------------------------------------------------------------------------------------


def classes(tmp_path, *labels, held=None, notices=None):
    options = {} if held is None else {"eval": write(tmp_path / "b.jsonl", labelled(*held))}
    return opened(write(tmp_path / "a.jsonl", labelled(*labels)), objective="classify", notices=notices, **options)


@pytest.mark.parametrize(("labels", "numbered", "said"), [
    ((0, 1, 0), {0: 0, 1: 1}, False),
    ((2, 1, 2), {1: 0, 2: 1}, True),
    ((0, 5, 3), {0: 0, 3: 1, 5: 2}, True),
    (("1", 2, 1.0), {1: 0, 2: 1}, True),
    (("pos", "neg"), {"neg": 0, "pos": 1}, True),
], ids=str)  # fmt: skip
def test_labels_are_numbered_from_0(tmp_path, labels, numbered, said):
    notices = []
    found = classes(tmp_path, *labels, notices=notices)
    assert found.labels == numbered
    assert found.num_labels == len(numbered)
    assert any(n.startswith("classes: ") for n in notices) is said


def test_numbers_reach_batches_and_names_the_model(tmp_path):
    found = classes(tmp_path, "pos", "neg", "so-so", "pos", held=("pos", "neg"))
    bundle, loader, (held,) = encoded(found, "classify", found.num_labels)
    assert bundle.model.config.id2label == {0: "neg", 1: "pos", 2: "so-so"}
    assert bundle.model.config.label2id == {"neg": 0, "pos": 1, "so-so": 2}
    assert bundle.model.config.num_labels == 3
    by_id = {i.id: i.label for i in loader.items}
    assert by_id == {"a.jsonl:1": 1, "a.jsonl:2": 0, "a.jsonl:3": 2, "a.jsonl:4": 1}
    assert sorted(held.label.tolist()) == [0, 1]


@pytest.mark.parametrize(("labels", "held", "message"), [
    ((0, 1, "pos"), None, r"a.jsonl:3: the label 'pos' is a name, but 0 is not"),
    (("neg", "pos"), ("pos", "positive"), r"b.jsonl:2: unknown label of held-out data 'positive'"),
    ((0, 1), (0, 2), r"b.jsonl:2: unknown label of held-out data '2'"),
    ((1, 1, 1), None, "all 3 examples have the label 1"),
    ((0, None), None, r"(?s)a.jsonl.*row 2.*'label' is null"),
    ((0, -1), None, r"(?s)row 2.*label is -1.*unlabelled"),
], ids=str)  # fmt: skip
def test_labels_that_cannot_be_learnt(tmp_path, labels, held, message):
    with pytest.raises(UsageError, match=message):
        classes(tmp_path, *labels, held=held)


# --- micro-batches -------------------------------------------------------------------------------------------


def test_token_budget_follows_the_size_of_the_model():
    small, large = (models.load(n).model.config for n in ("lab/llama-50k", "lab/llama-6m"))
    assert token_budget(small, "cpu") >= token_budget(large, "cpu") >= 512


@pytest.mark.real
def test_the_classification_recipe_reads_local_files(shared_data):
    """Columns and split are those of the hub's data set; files with other names are read all the same."""
    run, document = config.load(
        Path(__file__).parents[3] / "recipes" / "classify-minilm.yaml",
        [f"data.train={shared_data}/sst2-train.tsv", f"data.eval={shared_data}/sst2-dev.tsv", "data.limit=50"],
    )
    found = open_data(resolve(run, document), ENGINE)
    assert (len(found.train["train"]), len(found.held_out)) == (50, 872)
    assert found.labels == {0: 0, 1: 1}
