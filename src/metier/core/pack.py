"""Nested state <-> named tensors + JSON, without pickle.

Plain JSON stays as it is; what JSON cannot say is an object with the key ``"$"``: ``{"$": "tensor", "v":
"state.0.exp_avg"}``, ``{"$": "tuple", "v": […]}``, ``{"$": "dict", "v": [[key, value], …]}`` for keys that
are not text, ``{"$": "float", "v": "nan"}``, ``{"$": "bytes", "v": "00ff"}``.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metier.core.errors import MetierError

_TAG = "$"


def pack(nested: Any) -> tuple[dict[str, Tensor], Any]:
    """Separate the tensors of a nested state from the rest.

    Takes dicts (keys: text, numbers, booleans, ``None``, tuples of these), lists, tuples, text, numbers,
    ``None``, bytes and tensors. ``unpack`` gives back equal values of the same types, order of keys included;
    NumPy scalars become Python numbers and subclasses their base (``OrderedDict`` a dict, ``Parameter`` a
    tensor). A tensor that occurs twice is stored once and is one tensor again afterwards. Raises
    ``MetierError`` naming the place of anything else.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _Packer(tensors).value(nested, ())


class _Packer:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.names: dict[int, str] = {}

    def value(self, x: Any, path: tuple[str, ...]) -> Any:
        if isinstance(x, Tensor):
            return {_TAG: "tensor", "v": self.tensor(x, path)}
        if isinstance(x, Mapping):
            return self.mapping(x, path)
        if isinstance(x, list | tuple):
            items = [self.value(item, (*path, str(i))) for i, item in enumerate(x)]
            return items if isinstance(x, list) else {_TAG: "tuple", "v": items}
        return _scalar(x, path)

    def mapping(self, x: Mapping[Any, Any], path: tuple[str, ...]) -> Any:
        pairs = [(key, self.value(item, (*path, str(key)))) for key, item in x.items()]
        if all(type(key) is str for key, _ in pairs) and _TAG not in x:
            return dict(pairs)
        return {_TAG: "dict", "v": [[self.value(key, (*path, "key")), item] for key, item in pairs]}

    def tensor(self, x: Tensor, path: tuple[str, ...]) -> str:
        if id(x) not in self.names:
            base = name = ".".join(path) or "value"
            n = 1
            while name in self.tensors or name == "__metadata__":
                n += 1
                name = f"{base}~{n}"
            self.tensors[name] = x.detach()
            self.names[id(x)] = name
        return self.names[id(x)]


def _scalar(x: Any, path: tuple[str, ...]) -> Any:
    if type(x).__module__ == "numpy" and hasattr(x, "item") and getattr(x, "ndim", 1) == 0:
        x = x.item()
    if isinstance(x, float):
        return float(x) if math.isfinite(x) else {_TAG: "float", "v": str(float(x))}
    if x is None or isinstance(x, bool):
        return x
    if isinstance(x, int):
        return int(x)
    if isinstance(x, str):
        return str(x)
    if isinstance(x, bytes):
        return {_TAG: "bytes", "v": x.hex()}
    raise MetierError(f"state {'.'.join(path) or 'value'} is a {type(x).__name__}, which a checkpoint cannot hold")


def unpack(tensors: Mapping[str, Tensor], value: Any) -> Any:
    """The nested state that :func:`pack` took apart. Raises ``MetierError`` when a tensor is missing."""
    if isinstance(value, list):
        return [unpack(tensors, item) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: unpack(tensors, item) for key, item in value.items()}
    return _untag(tensors, value[_TAG], value["v"])


def _untag(tensors: Mapping[str, Tensor], tag: str, v: Any) -> Any:
    if tag == "tensor":
        if v not in tensors:
            raise MetierError(f"the checkpoint has no tensor {v}")
        return tensors[v]
    if tag == "tuple":
        return tuple(unpack(tensors, item) for item in v)
    if tag == "dict":
        return {unpack(tensors, key): unpack(tensors, item) for key, item in v}
    if tag == "float":
        return float(v)
    if tag == "bytes":
        return bytes.fromhex(v)
    raise MetierError(f"unknown kind of state {tag!r}: the checkpoint was written by a newer version")
