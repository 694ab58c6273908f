"""F8–F11: a damaged, altered or hostile checkpoint is refused by name, and the one before it is used."""

import hashlib
import json
import os
import pickle
import random
import shutil
import struct

import pytest
from checkpoints import assert_is, save

from metier.core import state

FILES = ["model.safetensors", "optim.safetensors", "parts.safetensors", "run.json", "MANIFEST.json"]


@pytest.fixture
def root(tmp_path):
    save(tmp_path / "c", 1)
    save(tmp_path / "c", 2)
    return tmp_path / "c"


def refused(root, name: str | None = None, step: int = 1) -> str:
    """The newest is passed over for a reason that names the file; ``step`` is found. Returns the reason."""
    said: list[str] = []
    assert_is(state.find(root, said.append), step)
    assert said
    if name:
        assert name in said[0], said
    with pytest.raises(state.Damaged) as e:
        state.read(root / "step-00000002")
    return str(e.value)


def reseal(path) -> None:
    """What somebody who knows the format would do after altering files: a manifest that fits them."""
    listed = {
        p.name: {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in sorted(path.iterdir())
        if p.name != "MANIFEST.json"
    }
    forge(path, files=listed)


def forge(path, **changes) -> None:
    manifest = {**json.loads((path / "MANIFEST.json").read_bytes()), **changes}
    manifest.pop("seal")
    plain = (json.dumps(manifest, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
    manifest["seal"] = hashlib.sha256(plain).hexdigest()
    (path / "MANIFEST.json").write_text(json.dumps(manifest, ensure_ascii=False, separators=(",", ":")) + "\n")


def test_the_forging_helper_forges(root):
    reseal(root / "step-00000002")
    assert_is(state.find(root), 2)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("length", ["0", "1", "half", "all but one"])
def test_truncated(root, name, length):
    path = root / "step-00000002" / name
    size = path.stat().st_size
    os.truncate(path, {"0": 0, "1": 1, "half": size // 2, "all but one": size - 1}[length])
    refused(root, name)


@pytest.mark.parametrize("name", FILES)
def test_one_bit_flipped(root, name):
    path = root / "step-00000002" / name
    good = path.read_bytes()
    rng = random.Random(name)
    for position in {0, len(good) - 1, *(rng.randrange(len(good)) for _ in range(20))}:
        raw = bytearray(good)
        raw[position] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        refused(root, name)
    path.write_bytes(good)
    assert_is(state.find(root), 2)


@pytest.mark.parametrize("name", FILES)
def test_deleted(root, name):
    (root / "step-00000002" / name).unlink()
    refused(root, name)


def test_two_files_swapped(root):
    folder = root / "step-00000002"
    a, b = folder / "model.safetensors", folder / "optim.safetensors"
    a.replace(folder / "x")
    b.replace(a)
    (folder / "x").replace(b)
    refused(root, "model.safetensors")


def test_a_file_of_another_step(root):
    shutil.copy(root / "step-00000001" / "model.safetensors", root / "step-00000002" / "model.safetensors")
    refused(root, "model.safetensors")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("run.json", '"step":2', '"step":3'),
        ("MANIFEST.json", '"finite":true', '"finite":false'),
        ("MANIFEST.json", '"step":2', '"step": 2'),
        ("MANIFEST.json", '"format":1', '"format":1,"more":1'),
    ],
)
def test_json_edited_by_hand(root, name, old, new):
    path = root / "step-00000002" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    refused(root, name)


@pytest.mark.parametrize("text", ["[]", "null", "1", '"x"', "{}", "[" * 100_000, '{"seal":1}', "NaN", "\x00"])
def test_a_manifest_that_is_none(root, text):
    (root / "step-00000002" / "MANIFEST.json").write_text(text)
    refused(root, "MANIFEST.json")


def test_a_folder_copied_under_another_steps_name(root):
    shutil.copytree(root / "step-00000001", root / "step-00000009")
    said: list[str] = []
    assert_is(state.find(root, said.append), 2)
    assert "step-00000009 holds step 1" in said[0]


def test_a_newer_format_says_so(root):
    forge(root / "step-00000002", format=2)
    assert "format 2" in refused(root)


# --- hostile ------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, target) -> None:
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("name", ["extra.pkl", "extra.pt", "model.bin", "model.safetensors", "run.json"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_pickle_is_never_opened(root, tmp_path, name, listed):
    folder = root / "step-00000002"
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    if listed:
        reseal(folder)
    refused(root)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", [*FILES, "more.safetensors"])
def test_a_link_is_refused(root, tmp_path, name):
    path = root / "step-00000002" / name
    outside = tmp_path / "outside"
    shutil.copy(path if path.exists() else path.with_name("model.safetensors"), outside)
    path.unlink(missing_ok=True)
    path.symlink_to(outside)
    refused(root, name)


def test_a_checkpoint_that_is_a_link_is_refused(root, tmp_path):
    (root / "step-00000002").replace(tmp_path / "step-00000002")
    (root / "step-00000002").symlink_to(tmp_path / "step-00000002")
    refused(root, "step-00000002")


@pytest.mark.parametrize(
    "name",
    [
        "../outside.json",
        "/etc/passwd",
        "a/b.json",
        "..",
        "",
        ".hidden.json",
        "x.pkl",
        "x.json\n",
        "ä.json",
        "a\\b.json",
    ],
)
def test_names_that_lead_elsewhere(root, tmp_path, name):
    (root / "outside.json").write_text("{}")
    folder = root / "step-00000002"
    manifest = json.loads((folder / "MANIFEST.json").read_bytes())
    entry = {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    forge(folder, files={**manifest["files"], name: entry})
    refused(root, "MANIFEST.json")


@pytest.mark.parametrize("changes", [{"step": True}, {"step": "2"}, {"finite": 1}, {"files": []}, {"files": {}}])
def test_a_resealed_manifest_of_the_wrong_shape(root, changes):
    forge(root / "step-00000002", **changes)
    refused(root, "MANIFEST.json")


def header(text: bytes, declared: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text) if declared is None else declared) + text + data


F32 = b'{"a":{"dtype":"F32","shape":%s,"data_offsets":[%d,%d]}}'


@pytest.mark.parametrize(
    "raw",
    [
        header(b"{}", declared=2 << 30),
        header(b"{}", declared=(1 << 64) - 1),
        header(b"{}", declared=3),
        header(b"not json"),
        header(b'{"a":{"dtype":"F32"'),
        header(F32 % (b"[4611686018427387904]", 0, 4), data=bytes(4)),
        header(F32 % (b"[-1]", 0, 4), data=bytes(4)),
        header(F32 % (b"[2]", 0, 4), data=bytes(4)),
        header(F32 % (b"[1]", 8, 12), data=bytes(12)),
        header(F32 % (b"[1]", 4, 0), data=bytes(4)),
        header(F32.replace(b"F32", b"F99") % (b"[1]", 0, 4), data=bytes(4)),
        header(F32 % (b"[1]", 0, 4), data=bytes(400)),
        b"",
        b"\x01",
    ],
    ids=lambda raw: f"{len(raw)} bytes",
)
def test_a_hostile_safetensors_file_with_a_manifest_that_fits(root, raw):
    folder = root / "step-00000002"
    (folder / "model.safetensors").write_bytes(raw)
    reseal(folder)
    with pytest.raises(state.Damaged, match=r"model\.safetensors"):
        state.read(folder)
    assert_is(root / "step-00000001", 1)


def test_an_enormous_manifest_is_not_read(root):
    path = root / "step-00000002" / "MANIFEST.json"
    with path.open("ab") as f:
        f.truncate(2 << 30)
    assert "too large" in refused(root, "MANIFEST.json")


def test_a_pipe_in_the_folder_does_not_hang(root):
    os.mkfifo(root / "step-00000002" / "extra.json")
    refused(root, "extra.json")


def test_a_file_managers_hidden_file_is_no_damage(root):
    (root / "step-00000002" / ".DS_Store").write_bytes(b"x")
    assert_is(state.find(root), 2)


def test_finding_changes_nothing(root):
    (root / ".step-00000003.tmp-00000000").mkdir()
    (root / "step-00000002" / "run.json").unlink()
    before = sorted(str(p) for p in root.rglob("*"))
    state.find(root)
    assert sorted(str(p) for p in root.rglob("*")) == before


def test_no_folder_and_no_checkpoint(tmp_path):
    assert state.find(tmp_path / "missing") is None
    assert state.find(tmp_path) is None
    (tmp_path / "step-00000001").write_text("a file")
    said: list[str] = []
    assert state.find(tmp_path, said.append) is None
    assert "not a folder" in said[0]
