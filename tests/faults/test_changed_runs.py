"""F17: what may change between a checkpoint and its continuation, and what may not (P8)."""

import json

import pytest
from runs import assert_same, go, outcome, rows, settings, stop_after, write_rows

from metier.core import log
from metier.core.errors import MetierError, UsageError


@pytest.fixture
def stopped(tmp_path):
    """A run stopped after step 5."""
    data = write_rows(tmp_path / "text.jsonl", rows())
    run = settings(data)
    stop_after(5, tmp_path / "run", run)
    return tmp_path / "run", run, data


def refused(folder, run, *said: str) -> None:
    before = outcome(folder)
    with pytest.raises(UsageError) as e:
        go(folder, run)
    for text in said:
        assert text in str(e.value), str(e.value)
    assert outcome(folder) == before


def test_one_row_changed(stopped):
    folder, run, data = stopped
    changed = rows()
    changed[7]["text"] += "."
    write_rows(data, changed)
    refused(folder, run, "other data", "--restart")


def test_row_order_changed(stopped):
    folder, run, data = stopped
    write_rows(data, rows()[::-1])
    refused(folder, run, "other data")


def test_a_row_more(stopped):
    folder, run, data = stopped
    write_rows(data, [*rows(), {"text": "more"}])
    refused(folder, run, "other data")


def test_the_same_rows_elsewhere_are_the_same_data(stopped, tmp_path):
    """The fingerprint is of content; a folder that was moved goes on."""
    folder, run, data = stopped
    data.rename(tmp_path / "moved.jsonl")
    run["data"]["train"] = str(tmp_path / "moved.jsonl")
    assert go(folder, run).status == "done"


def test_max_length_changed(stopped):
    folder, run, _ = stopped
    run["data"]["max_length"] = 32
    refused(folder, run, "max_length")


def test_the_stored_seed_is_used_for_the_order(tmp_path):
    data = write_rows(tmp_path / "text.jsonl", rows())
    go(tmp_path / "base", settings(data, train__steps=1))
    run = settings(data, model=str(tmp_path / "base" / "model"))
    go(tmp_path / "reference", run)
    stop_after(5, tmp_path / "run", run)
    run["train"]["seed"] = 4
    go(tmp_path / "run", run)
    a, b = ([e["loss"] for e in log.read(tmp_path / f) if e["event"] == "step"] for f in ("reference", "run"))
    assert a == b, "without dropout the seed matters for the order only"


def test_another_seed_of_a_model_from_scratch_is_another_model(stopped):
    folder, run, _ = stopped
    run["train"]["seed"] = 4
    refused(folder, run, "another version of lab/llama-50k")


def test_another_batch_size_continues_at_the_same_example(stopped):
    folder, run, _ = stopped
    run["train"]["batch"] = 2
    run["train"]["steps"] = 7
    assert go(folder, run).status == "done"
    checkpoint = json.loads((folder / "checkpoints" / "step-00000007" / "run.json").read_text())
    assert checkpoint["data"]["position"] == 5 * 4 + 2 * 2


def test_micro_batch_workers_and_steps_may_change(stopped, tmp_path):
    folder, run, _ = stopped
    run["train"]["steps"] = 6
    run["schedule"] = "constant"
    go(folder, run)
    run["train"] |= {"steps": 8, "workers": 2, "micro_batch": 1}
    assert go(folder, run).step == 8


def test_another_tokenizer(tmp_path):
    data = write_rows(tmp_path / "text.jsonl", rows())
    go(tmp_path / "base", settings(data, train__steps=1))
    model = tmp_path / "base" / "model"
    run = settings(data, model=str(model))
    stop_after(3, tmp_path / "run", run)
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(tokenizer))
    refused(tmp_path / "run", run, "tokenizer")


def test_another_chat_template(tmp_path):
    chats = [{"messages": [{"role": "user", "content": r["text"]}, {"role": "assistant", "content": "yes"}]} for r in rows()]
    data = write_rows(tmp_path / "chat.jsonl", chats)
    go(tmp_path / "base", settings(data, train__steps=1))
    model = tmp_path / "base" / "model"
    run = settings(data, model=str(model))
    stop_after(3, tmp_path / "run", run)
    path = model / "chat_template.jinja"
    path.write_text(path.read_text() + "{# #} ")
    refused(tmp_path / "run", run, "template")


def test_another_model(stopped, tmp_path):
    folder, run, _ = stopped
    refused(folder, {**run, "model": "lab/llama-300k"}, "another version")


def test_another_optimizer(stopped):
    folder, run, _ = stopped
    before = outcome(folder)
    with pytest.raises(MetierError):
        go(folder, {**run, "optimizer": {"lion": {"lr": 1e-3}}})
    assert outcome(folder) == before


def test_restart_starts_afresh(stopped, tmp_path):
    folder, run, data = stopped
    write_rows(data, rows(seed=9))
    go(folder, run, resume=False)
    go(tmp_path / "reference", run)
    assert_same(outcome(folder), outcome(tmp_path / "reference"))
