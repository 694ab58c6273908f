"""Packing is exact, files are what the safetensors library reads, and a state comes back bit for bit."""

import collections
import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.core import state
from metier.core.errors import MetierError
from metier.core.tensorfile import _NAMES, write_tensors


def bytes_of(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def same(a, b) -> bool:
    """Equality of values, types, key order and bits."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
            and bytes_of(a).equal(bytes_of(b))
        )  # fmt: skip
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return (
            list(a) == list(b) and all(type(x) is type(y) for x, y in zip(a, b, strict=True)) and all(same(a[k], b[k]) for k in a)
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def round_trip(value, tmp_path=None):
    tensors, document = state.pack(value)
    document = json.loads(json.dumps(document, allow_nan=False))
    if tmp_path is not None:
        write_tensors(tmp_path / "t.safetensors", tensors)
        tensors = safetensors.torch.load_file(tmp_path / "t.safetensors")
    return state.unpack(tensors, document)


def test_a_state_of_everything(tmp_path):
    shared = torch.arange(4)
    value = {
        "state": {0: {"exp_avg": torch.randn(3, 2), "step": torch.tensor(7.0)}, 1: {}},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1], "name": None, "on": True}],
        "0": 1, "$": "a tag", "nested": {"$": {"$": (), "v": []}}, "empty": {}, "list": [], "text": "é\n\"",
        "mixed": {2: "int", "2": "text", True: "bool", None: 0, (1, "a"): [0.5]},
        "numbers": [2**80, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan, True, 1],
        "bytes": b"\x00\xff", "a.b": torch.ones(2), "a": {"b": torch.zeros(2)}, "__metadata__": torch.ones(1),
        "first": shared, "again": [shared],
    }  # fmt: skip
    back = round_trip(value, tmp_path)
    assert same(value, back)
    assert math.copysign(1, back["numbers"][1]) == -1
    assert back["first"] is back["again"][0]
    assert same(torch.ones(3), round_trip(torch.ones(3)))


DTYPES = [torch.float64, torch.bfloat16, torch.bool]
leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=5)
    | st.sampled_from(["tensor", "$", "v"])
    | st.builds(lambda n, d: torch.arange(n).to(d), st.integers(0, 3), st.sampled_from(DTYPES))
)  # fmt: skip
keys = st.text(max_size=3) | st.integers(-3, 3) | st.sampled_from(["$", "v", "0", "~2"])
nested = st.recursive(leaves, lambda x: st.lists(x) | st.lists(x).map(tuple) | st.dictionaries(keys, x), max_leaves=12)


@settings(max_examples=150, deadline=None)
@given(nested)
def test_any_state_comes_back(value):
    assert same(value, round_trip(value))


def test_numpy_scalars_and_subclasses_become_plain():
    value = {
        "a": np.float32(0.5),
        "b": np.int64(3),
        "c": np.bool_(True),
        "d": collections.OrderedDict(x=1),
        "e": torch.Size([2]),
    }
    assert same({"a": 0.5, "b": 3, "c": True, "d": {"x": 1}, "e": (2,)}, round_trip(value))
    assert type(round_trip(torch.nn.Parameter(torch.ones(2)))) is torch.Tensor


@pytest.mark.parametrize("bad", [{1, 2}, object(), torch.float32, np.zeros(2), lambda: 0, 1j])
def test_what_cannot_be_kept_is_named(bad):
    with pytest.raises(MetierError, match=r"parts\.0\.thing is a"):
        state.pack({"parts": [{"thing": bad}]})


def test_a_missing_tensor_and_an_unknown_tag_are_errors():
    tensors, document = state.pack({"a": torch.ones(1)})
    with pytest.raises(MetierError, match="no tensor a"):
        state.unpack({}, document)
    with pytest.raises(MetierError, match="newer version"):
        state.unpack(tensors, {"$": "set", "v": []})


@pytest.mark.parametrize("dtype", list(_NAMES), ids=str)
def test_each_dtype_as_the_library_reads_it(tmp_path, dtype):
    raw = torch.randint(0, 256 if dtype != torch.bool else 2, (6, 4 * 8), dtype=torch.uint8)
    tensor = raw.view(dtype)
    write_tensors(
        tmp_path / "t.safetensors",
        {"t": tensor, "0-d": tensor[0, 0], "none": tensor[:0], "turned": tensor.t()},
    )
    back = safetensors.torch.load_file(tmp_path / "t.safetensors")
    assert same(back["t"], tensor)
    assert same(back["0-d"], tensor[0, 0])
    assert same(back["none"], tensor[:0])
    assert same(back["turned"], tensor.t())


def test_views_of_one_storage_and_lazy_conjugates(tmp_path):
    base = torch.randn(4, 4, dtype=torch.complex64)
    tensors = {
        "all": base,
        "row": base[1],
        "step": base[::2, ::3],
        "conj": base.conj(),
        "wide": base[:1].expand(3, 4),
    }
    write_tensors(tmp_path / "t.safetensors", tensors)
    back = safetensors.torch.load_file(tmp_path / "t.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name


def test_the_file_is_the_librarys_own_bytes(tmp_path):
    tensors = {"b": torch.randn(3), "a": torch.randn(2, 2), "i": torch.arange(3), "h": torch.randn(3).half()}
    write_tensors(tmp_path / "ours", tensors)
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("bad", [torch.ones(2).to_sparse(), torch.ones(2, device="meta"), torch.ones(2).to(torch.complex128)])
def test_a_tensor_without_plain_content_is_refused_by_name(tmp_path, bad):
    with pytest.raises(MetierError, match="weird"):
        state.write(tmp_path, 1, tensors={"model": {"weird": bad}}, meta={}, finite=True)
    assert list(tmp_path.iterdir()) == []


def test_write_find_read(tmp_path):
    root = tmp_path / "new" / "checkpoints"
    path = state.write(root, 120, tensors={"model": {"w": torch.eye(3)}, "parts": {}}, meta={"tokens": 5}, finite=False)
    assert path == root / "step-00000120"
    assert sorted(p.name for p in path.iterdir()) == [
        "MANIFEST.json",
        "model.safetensors",
        "parts.safetensors",
        "run.json",
    ]
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert manifest["format"] == 1
    assert manifest["step"] == 120
    assert manifest["finite"] is False
    said: list[str] = []
    assert state.find(root, said.append) == path
    assert "not finite" in said[0]
    loaded = state.read(path)
    assert (loaded.step, loaded.finite, loaded.meta, loaded.path) == (120, False, {"tokens": 5}, path)
    assert loaded.tensors["parts"] == {}
    assert same(loaded.tensors["model"]["w"], torch.eye(3))


def test_the_newest_is_by_number_not_by_time_or_text(tmp_path):
    for step in (100_000_000, 99_999_999, 5):
        state.write(tmp_path, step, tensors={}, meta={}, finite=True)
    assert state.find(tmp_path) == tmp_path / "step-100000000"


def test_meta_must_be_json_without_nan(tmp_path):
    for meta in ({"x": math.nan}, {"x": object()}):
        with pytest.raises((ValueError, TypeError)):
            state.write(tmp_path, 1, tensors={}, meta=meta, finite=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stem", ["../x", "a/b", "", ".x", "x.y"])
def test_file_names_are_plain(tmp_path, stem):
    with pytest.raises(ValueError, match="name of a checkpoint file"):
        state.write(tmp_path, 1, tensors={stem: {}}, meta={}, finite=True)


def test_saving_needs_little_memory_beyond_the_state(tmp_path):
    import tracemalloc

    tensors = {str(i): torch.zeros(1 << 20) for i in range(8)}
    tracemalloc.start()
    state.write(tmp_path, 1, tensors={"model": tensors}, meta={}, finite=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20, "32 MB of tensors"
