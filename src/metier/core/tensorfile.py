"""Tensors to a safetensors file, one at a time and hashed on the way; and back.

Format: eight bytes with the header's length (little endian), the header (JSON: name -> dtype, shape,
offsets), then the tensors' bytes without gaps. Files are read with the ``safetensors`` library; writing them
here keeps every single write visible to ``core/files.py`` and needs no copy of the state on the CPU.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metier.core import files
from metier.core.errors import MetierError

MAX_HEADER = 100_000_000
_BLOCK = 1 << 22
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a new file and wait for the storage. Returns ``{"size", "sha256"}``.

    Tensors may be anywhere, non-contiguous, views of each other; each is stored in full. Raises ``OSError``
    from the file system and ``MetierError`` for a tensor that has no plain content (sparse, quantized, meta)
    or no such dtype.
    """
    ordered = sorted(tensors.items(), key=lambda kv: (-kv[1].element_size(), kv[0]))
    sha, size = hashlib.sha256(), 0
    with files.create(path) as file:
        for data in _pieces(ordered):
            files.write(file, data)
            sha.update(data)
            size += len(data)
        files.fsync(file)
    return {"size": size, "sha256": sha.hexdigest()}


def _pieces(ordered: list[tuple[str, Tensor]]) -> Iterator[bytes | memoryview]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _NAMES:
            raise MetierError(f"tensor {name} ({tensor.dtype}, {tensor.layout}, {tensor.device}) cannot be saved")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        raw: Any = plain.reshape(-1).view(torch.uint8).numpy()
        data = memoryview(raw)
        for start in range(0, len(data), _BLOCK):
            yield data[start : start + _BLOCK]


def check_header(path: Path) -> None:
    """Raise ``ValueError`` unless the file is a valid safetensors file; of the tensors nothing is read."""
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    with path.open("rb") as file:
        declared = int.from_bytes(file.read(8), "little")
    if size < 8 or declared > min(MAX_HEADER, size - 8):
        raise ValueError(f"{path.name} declares a header of {declared} bytes in a file of {size}")
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as e:
        raise ValueError(f"{path.name} is not a valid safetensors file: {e}") from e


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU. Raises ``ValueError`` when it is not a valid safetensors file."""
    from safetensors.torch import load_file

    check_header(path)
    try:
        return load_file(path)
    except KeyError as e:
        raise ValueError(f"{path.name} holds the dtype {e}, which this version of PyTorch does not know") from e
