"""``metier data``: what is printed and the exit codes 0 (fine), 1 (bad rows), 2 (wrong request)."""

import json

import pytest

from metier.cli import main

CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}]}


def run(capsys, *argv):
    with pytest.raises(SystemExit) as e:
        main(["data", *map(str, argv)])
    out = capsys.readouterr()
    return e.value.code, out.out, out.err


@pytest.fixture
def chat(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join([json.dumps(CHAT)] * 4))
    return path


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join([json.dumps(CHAT), "bad", '{"messages": []}', json.dumps(CHAT)]))
    return path


def test_preview(capsys, chat):
    code, out, err = run(capsys, "preview", chat, "--limit", 2)
    assert code == 0
    assert "chat.jsonl:1  Chat" in out
    assert "messages / assistant: hi there" in out
    assert "chat.jsonl:3" not in out
    assert "format messages" in err


def test_preview_json_is_pure(capsys, chat):
    code, out, _ = run(capsys, "preview", chat, "--json")
    found = json.loads(out)
    assert code == 0
    assert len(found) == 3
    assert found[0] == {"type": "Chat", "id": "chat.jsonl:1", "meta": {}, **CHAT}


def test_preview_with_columns(capsys, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("body,class\nfine,1\n")
    argv = ("preview", path, "--columns", "text=body", "--columns", "label=class", "--json")
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert json.loads(out)[0]["label"] == 1
    assert run(capsys, "preview", path, "--columns", "text")[0] == 2
    code, _, err = run(capsys, "preview", path, "--columns", "text=bdy")
    assert code == 2
    assert "Did you mean 'body'?" in err


def test_preview_of_bad_rows_is_a_usage_error(capsys, broken):
    code, _, err = run(capsys, "preview", broken)
    assert code == 2
    assert "broken.jsonl row 2: not JSON" in err


def test_check_of_good_data(capsys, chat):
    code, out, _ = run(capsys, "check", chat)
    assert code == 0
    assert "4 rows, 4 examples, 3 duplicates, 0 bad rows" in out
    code, out, _ = run(capsys, "check", chat, "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["ok"], report["format"], report["rows"]) == (True, "messages", 4)


def test_check_lists_unreadable_and_unusable_rows(capsys, broken):
    code, out, _ = run(capsys, "check", broken)
    assert code == 1
    assert "2 bad rows" in out
    assert "broken.jsonl row 2  not JSON" in out
    assert "broken.jsonl row 3  messages is empty" in out
    code, out, _ = run(capsys, "check", broken, "--json")
    assert code == 1
    assert [p["where"] for p in json.loads(out)["problems"]] == ["broken.jsonl row 2", "broken.jsonl row 3"]


def test_wrong_requests_exit_with_two(capsys, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "unreadable.jsonl").write_text("bad\nworse")
    for argv in (
        *(("check", tmp_path / name) for name in ("empty.jsonl", "unreadable.jsonl", "nothing.jsonl")),
        ("check", tmp_path / "empty.jsonl", "--format", "txt"),
        ("chek",),
    ):
        code, _, err = run(capsys, *argv)
        assert code == 2
        assert err.startswith("metier: ")


def test_importing_the_verb_is_light():
    import subprocess
    import sys

    code = "import sys, metier.cli.data; assert not {'torch', 'datasets', 'numpy', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
