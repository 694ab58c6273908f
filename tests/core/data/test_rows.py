"""Reading rows (F18): every kind of file, every kind of damage, with the place of each bad row."""

import csv
import gzip
import hashlib
import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metier.core.data.readers import Problems
from metier.core.data.rows import Rows, open_rows
from metier.core.errors import UsageError

ROWS = [{"text": "one", "n": 1}, {"text": "zwei\u2028 \x85 ü 🙂", "n": 2}, {"text": "three\nlines", "n": 3}]
LINES = "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS) + "\n"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def refused(where, **options) -> str:
    with pytest.raises(UsageError) as e:
        open_rows(where, **options)
    return str(e.value)


SPELLINGS = {
    "plain.jsonl": LINES,
    "no-newline-at-end.jsonl": LINES.rstrip("\n"),
    "crlf.jsonl": LINES.replace("\n", "\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "list-in-lines-file.jsonl": json.dumps(ROWS),
    "list.json": json.dumps(ROWS, indent=2),
    "bom-list.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "lines.json": LINES,
    "blank-lines.jsonl": LINES.replace("\n", "\n\n  \n"),
    "packed.jsonl.gz": gzip.compress(LINES.encode()),
    "list.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "UPPER.JSONL": LINES,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_all_spellings_of_json_are_the_same_rows(tmp_path, name):
    rows = open_rows(write(tmp_path / name, SPELLINGS[name]))
    assert list(rows) == ROWS
    assert rows.name == name
    assert rows.fingerprint == open_rows(write(tmp_path / "x.jsonl", LINES)).fingerprint


def test_fingerprint_is_the_stated_hash():
    """Recomputed by hand, so it cannot drift between versions or machines unnoticed."""
    one = hashlib.sha256(b'{"a":1,"b":"\\u00fc"}').digest()
    two = hashlib.sha256(b'{"a":2}').digest()
    expected = hashlib.sha256(one + two).hexdigest()
    assert Rows.of([{"b": "ü", "a": 1}, {"a": 2}], "x").fingerprint == expected
    assert Rows.of([{"a": 2}, {"b": "ü", "a": 1}], "x").fingerprint != expected
    assert Rows.of([{"b": "ü", "a": 1}, {"a": "2"}], "x").fingerprint != expected


def test_fingerprint_does_not_confuse_row_boundaries():
    assert Rows.of([{"a": 1}, {"a": 1}]).fingerprint != Rows.of([{"a": 1}]).fingerprint


def test_place_is_the_line_in_the_file(tmp_path):
    rows = open_rows(write(tmp_path / "t.jsonl", '\n{"a": 1}\n\n{"a": 2}\n'))
    assert [rows.where(i) for i in range(2)] == ["t.jsonl row 2", "t.jsonl row 4"]
    assert [rows.id(i) for i in range(2)] == ["t.jsonl:2", "t.jsonl:4"]


def test_selections_keep_places_and_order(tmp_path):
    rows = open_rows(write(tmp_path / "t.jsonl", LINES))
    chosen = rows.select([2, 0])
    assert [chosen.id(0), chosen.id(1)] == ["t.jsonl:3", "t.jsonl:1"]
    assert list(chosen) == [ROWS[2], ROWS[0]]
    assert list(rows.head(2)) == ROWS[:2] == list(rows[:2])
    assert len(rows.head(99)) == 3
    assert rows[1:].where(0) == "t.jsonl row 2"
    assert rows.select(range(3)).fingerprint == rows.fingerprint


BAD = {
    b"{oops}": "not JSON",
    b"[1, 2]": "not an object but a list",
    b'"text"': "not an object but a string",
    b"17": "not an object but a number",
    b"null": "not an object but null",
    b'{"text": "\xff"}': "invalid UTF-8 (byte 0xff at position 11)",
    b'{"text": "a\0b"}': "NUL byte at position 12",
    b'{"text": "a\\u0000b"}': "NUL character",
    b'{"text": ["\\ud83d"]}': "half of a surrogate pair",
    b'{"text": "cut': "not JSON",
    b"[" * 100_000: "not JSON",
}


@pytest.mark.parametrize("line", BAD, ids=[v for v in BAD.values()])
def test_bad_line_is_named_by_row_and_reason(tmp_path, line):
    where = write(tmp_path / "t.jsonl", b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    message = refused(where)
    assert f"t.jsonl row 2: {BAD[line]}" in message
    assert "1 row cannot be used" in message


def test_fine_escapes_are_not_refused(tmp_path):
    where = write(tmp_path / "t.jsonl", rb'{"a": "\\u0000", "b": "\ud83d\ude00"}')
    assert open_rows(where)[0] == {"a": "\\u0000", "b": "😀"}


def test_all_bad_rows_are_reported_at_once_up_to_ten(tmp_path):
    message = refused(write(tmp_path / "t.jsonl", '{"a": 1}\n' + "bad\n" * 25))
    assert "25 rows cannot be used" in message
    assert message.count(": not JSON") == 10
    assert "t.jsonl row 11" in message
    assert "t.jsonl row 12" not in message
    assert "and 15 more" in message


def test_problems_can_be_collected_instead(tmp_path):
    found = Problems(keep=None)
    rows = open_rows(write(tmp_path / "t.jsonl", 'bad\n{"a": 1}\n[]\n'), problems=found)
    assert list(rows) == [{"a": 1}]
    assert [w for w, _ in found.shown] == ["t.jsonl row 1", "t.jsonl row 3"]


@pytest.mark.parametrize("name", ["e.jsonl", "e.json", "e.csv", "e.tsv", "e.txt", "e.jsonl.gz"])
@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_empty_file_is_said(tmp_path, name, content):
    assert "holds no rows" in refused(write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content))


def test_empty_message(tmp_path):
    assert "e.jsonl holds no rows" in refused(write(tmp_path / "e.jsonl", ""))
    assert "e.json holds no rows" in refused(write(tmp_path / "e.json", "[]"))


def test_one_row_and_a_megabyte_row(tmp_path):
    for name, content in [("a.jsonl", json.dumps({"text": "x" * 2**20})), ("a.csv", "text\n" + "x" * 2**20)]:
        rows = open_rows(write(tmp_path / name, content))
        assert len(rows) == 1
        assert len(rows[0]["text"]) == 2**20


def test_limit_stops_reading(tmp_path):
    where = write(tmp_path / "t.jsonl", LINES + "bad\n" * 5)
    assert len(open_rows(where, limit=2)) == 2
    assert open_rows(where, limit=2).fingerprint == open_rows(where, limit=3).head(2).fingerprint


def test_missing_file_names_the_nearest_sibling(tmp_path):
    write(tmp_path / "train.jsonl", LINES)
    message = refused(str(tmp_path / "trian.jsonl"))
    assert "no such file" in message
    assert "train.jsonl" in message
    assert "there is no folder" in refused(str(tmp_path / "nowhere" / "train.jsonl"))
    assert "no such file" in refused("train.jsonll")
    assert "name too long" in refused("x" * 5000).lower()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.xlsx", b"PK", "unknown kind of data file '.xlsx'"),
        ("t.jsonl.gz", b"not gzip", "damaged"),
        ("t.jsonl.gz", gzip.compress(LINES.encode() * 50)[:-20], "damaged"),
        ("t.parquet", b"PAR1 nothing", "not a readable Parquet file"),
        ("t.jsonl", LINES.encode("utf-16"), "UTF-16"),
        ("t.json", b'[{"a": 1}, {"a": ]', "not JSON"),
        ("t.json", b'{\n "a": 1\n}', "over several lines"),
        ("t.csv", b"text,text\na,b", "repeats text"),
    ],
)
def test_damaged_files_are_refused_with_a_reason(tmp_path, name, content, reason):
    message = refused(write(tmp_path / name, content))
    assert reason in message
    assert name in message


def test_unreadable_file(tmp_path, monkeypatch):
    where = write(tmp_path / "t.jsonl", LINES)

    def fails(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", fails)
    assert "Permission denied" in refused(where)


# --- tables -----------------------------------------------------------------------------------------------


def test_csv_with_quotes_newlines_and_crlf(tmp_path):
    where = write(tmp_path / "t.csv", 'text,label\r\n"a, ""b""\r\nc",0\r\nplain,1\r\n')
    rows = open_rows(where)
    assert list(rows) == [{"text": 'a, "b"\r\nc', "label": "0"}, {"text": "plain", "label": "1"}]
    assert [rows.id(0), rows.id(1)] == ["t.csv:2", "t.csv:4"]


def test_bad_table_rows(tmp_path):
    where = write(tmp_path / "t.csv", b"text,label\na,1\nb\nc,1,2\n\xff,1\nd\0,1\ne,0\n")
    message = refused(where)
    for line in (
        "t.csv row 3: 1 columns instead of 2", "t.csv row 4: 3 columns instead of 2",
        "t.csv row 5: invalid UTF-8", "t.csv row 6: NUL",
    ):  # fmt: skip
        assert line in message
    assert "4 rows" in message


def test_unclosed_quote_is_an_error_and_not_a_huge_row(tmp_path):
    assert "t.csv row 2: not comma-separated" in refused(write(tmp_path / "t.csv", 'text,label\n"a,1\nb,0\n'))


def test_headers_are_recognised(tmp_path):
    def read(name, content, **options):
        return list(open_rows(write(tmp_path / name, content), **options))

    assert read("a.tsv", "good film , really\t1\nbad\t0\n") == [
        {"text": "good film , really", "label": "1"}, {"text": "bad", "label": "0"},
    ]  # fmt: skip
    assert read("b.tsv", "sentence\tlabel\nbad\t0\n") == [{"sentence": "bad", "label": "0"}]
    assert read("c.csv", "my text,the class\nbad,0\n", columns={"text": "my text", "label": "the class"}) == [
        {"text": "bad", "label": "0"}
    ]
    assert read("d.tsv", "is this so\tyes it is\t1\n") == [{"text": "is this so", "pair": "yes it is", "label": "1"}]
    assert "no header" in refused(write(tmp_path / "e.csv", "what is this,no idea at all\n"))


def test_tabs_come_without_quoting_except_where_it_is_proven(tmp_path):
    where = write(tmp_path / "t.tsv", 'text\tlabel\n"quoted start\t0\n"all"\t1\n"he said ""no"""\t1\n')
    assert [r["text"] for r in open_rows(where)] == ['"quoted start', '"all"', 'he said "no"']


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=5), st.sampled_from(["\n", "\r\n"]))
def test_csv_round_trip_against_the_writer(tmp_path, table, end):
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("prompt", "completion"), *table])
    rows = open_rows(write(tmp_path / "h.csv", out.getvalue()))
    assert [(r["prompt"], r["completion"]) for r in rows] == table


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | cells,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(cells, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(cells, values, max_size=3), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_json_round_trip(tmp_path, table, ascii, crlf):
    lines = [json.dumps(r, ensure_ascii=ascii) for r in table]
    rows = open_rows(write(tmp_path / "h.jsonl", ("\r\n" if crlf else "\n").join(lines)))
    assert list(rows) == table
    assert rows.fingerprint == open_rows(write(tmp_path / "h.json", json.dumps(table))).fingerprint


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    rows = open_rows(str(tmp_path / "t.parquet"))
    assert list(rows) == ROWS
    assert rows.where(2) == "t.parquet row 3"
    assert rows.fingerprint == open_rows(write(tmp_path / "t.jsonl", LINES)).fingerprint
    packed = write(tmp_path / "p.parquet.gz", gzip.compress((tmp_path / "t.parquet").read_bytes()))
    assert list(open_rows(packed)) == ROWS


# --- text, folders ----------------------------------------------------------------------------------------


def test_text_file_is_one_row(tmp_path):
    rows = open_rows(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n"))
    assert list(rows) == [{"text": "one\ntwo\n", "path": "a.txt"}]
    assert rows.where(0) == rows.id(0) == "a.txt"
    assert "b.txt: invalid UTF-8" in refused(write(tmp_path / "b.txt", b"a\xffb"))
    assert "c.txt: NUL character in line 2" in refused(write(tmp_path / "c.txt", b"a\nb\0"))


def test_folder_in_the_order_of_relative_paths(tmp_path):
    base = tmp_path / "corpus"
    for name in ("b.txt", "a/z.py", "a.md", ".hidden/x.txt", "a/__pycache__/y.py", "image.png"):
        write(base / name, name)
    write(base / "a/__init__.py", "")
    rows = open_rows(str(base))
    assert [r["path"] for r in rows] == ["a.md", "a/z.py", "b.txt"]
    assert rows.name == "corpus"
    assert rows.where(1) == "corpus/a/z.py"
    assert "1 of 5 files are not read" in rows.notices[0]


def test_folder_fingerprint_does_not_depend_on_its_place(tmp_path):
    prints = []
    for where in ("x/c", "y/deeper/d"):
        write(tmp_path / where / "a.txt", "text")
        write(tmp_path / where / "b.jsonl", LINES)
        prints.append(open_rows(str(tmp_path / where)).fingerprint)
    assert prints[0] == prints[1]


def test_folder_with_tables_leaves_the_data_card_out(tmp_path):
    base = tmp_path / "set"
    write(base / "README.md", "# card")
    write(base / "config.json", "{}")
    write(base / "data/train-00000.jsonl", LINES)
    write(base / "data/test-00000.jsonl.gz", gzip.compress(LINES.encode()))
    assert len(open_rows(str(base))) == 6
    rows = open_rows(str(base), split="train")
    assert [rows.id(i) for i in range(3)] == [f"set/data/train-00000.jsonl:{i}" for i in (1, 2, 3)]
    assert "no file of split 'validation'" in refused(str(base), split="validation")
    assert "no meaning for one file" in refused(str(base / "data/train-00000.jsonl"), split="train")


def test_empty_folder(tmp_path):
    assert "the folder has no file with one of .csv" in refused(str(tmp_path))


def test_bad_rows_of_several_files_come_together(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / "two" / name, "bad\n")
    message = refused(str(tmp_path / "two"))
    assert "two/a.jsonl row 1" in message
    assert "two/b.jsonl row 1" in message


# --- columns, hub, lab ------------------------------------------------------------------------------------


def test_columns_rename(tmp_path):
    where = write(tmp_path / "t.jsonl", '{"body": "a", "text": "old", "n": 1}\n{"n": 2}\n')
    rows = open_rows(where, columns={"text": "body"})
    assert list(rows) == [{"n": 1, "text": "a"}, {"n": 2}]
    swapped = open_rows(where, columns={"body": "text", "text": "body"})
    assert swapped[0] == {"text": "a", "body": "old", "n": 1}


def test_missing_column_names_the_nearest(tmp_path):
    message = refused(write(tmp_path / "t.jsonl", '{"body": "a"}'), columns={"text": "bodi"})
    assert "no column 'bodi'" in message
    assert "Did you mean 'body'?" in message


def test_column_that_has_the_expected_name_already_is_used_with_a_notice(tmp_path):
    where = write(tmp_path / "t.jsonl", '{"text": "a", "label": 1}')
    rows = open_rows(where, columns={"text": "sentence"})
    assert rows[0]["text"] == "a"
    assert "no column 'sentence'" in rows.notices[0]
    with_near = write(tmp_path / "u.jsonl", '{"text": "a", "sentences": "b"}')
    assert "Did you mean 'sentences'?" in refused(with_near, columns={"text": "sentence"})


def test_hub_id_without_network_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    message = refused("some-org/some-set:main")
    assert "cannot be reached" in message
    assert "local file" in message


def test_hub_rows_and_splits(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def fake(name, config):
        calls.append((name, config))
        return datasets.DatasetDict({s: datasets.Dataset.from_list(ROWS) for s in ("train", "test")})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    rows = open_rows("org/set:main", limit=2)
    assert calls == [("org/set", "main")]
    assert list(rows) == ROWS[:2]
    assert rows.where(1) == "org/set:main row 2"
    assert len(open_rows("org/set", split="test")) == 3
    assert "Did you mean 'test'?" in refused("org/set", split="tets")


def test_lab_documents(monkeypatch):
    corpus = pytest.importorskip("metier.lab.corpus")
    monkeypatch.setattr(corpus, "documents", lambda name: [{"text": name, "path": "p"}])
    assert list(open_rows("lab/python")) == [{"text": "python", "path": "p"}]


def test_network_is_guarded():
    import socket

    with pytest.raises(OSError, match="must not use the network"):
        socket.create_connection(("192.0.2.1", 80), timeout=0.1)
    server = socket.create_server(("127.0.0.1", 0))
    socket.create_connection(server.getsockname()).close()
    server.close()


@pytest.mark.real
def test_real_files(shared_data):
    counts = {
        "sst2-train.tsv": 6920,
        "sst2-dev.tsv": 872,
        "gsm8k-train.jsonl": 7473,
        "tinyshakespeare.txt": 1,
    }
    for name, n in counts.items():
        assert len(open_rows(str(shared_data / name))) == n
    assert set(open_rows(str(shared_data / "sst2-dev.tsv"))[0]) == {"text", "label"}
