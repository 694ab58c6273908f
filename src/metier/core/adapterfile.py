"""Adapters on disk.

PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``, whenever the adapter declares how
PEFT calls it. Otherwise ``adapter.json`` (``{"format": "metier-adapter", "part": …, "options": …, "targets":
[…]}``) and ``adapter.safetensors`` with the tensors ``<target>.<parameter>``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from metier.core import adapt, part
from metier.core.adapt import Attached
from metier.core.errors import UsageError
from metier.core.shards import opened
from metier.core.targets import fresh_head, shorten, task_type

PEFT = ("adapter_config.json", "adapter_model.safetensors")
OWN = ("adapter.json", "adapter.safetensors")
PREFIX = "base_model.model."


def save(attached: Attached, folder: Path) -> None:
    """Write ``attached`` to ``folder`` (made if missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = _peft_config(attached)
    if config is not None:
        tensors = {
            f"{PREFIX}{name}.{suffix}": getattr(a, own)
            for name, a in attached.adapters.items() for own, suffix in a.peft_names.items()
        }  # fmt: skip
        tensors |= {f"{PREFIX}{name}": attached.model.get_parameter(name) for name in attached.extra}
        _write(folder, PEFT, config, tensors)
        return
    tensors = {f"{name}.{key}": t for name, a in attached.adapters.items() for key, t in a.own_state().items()}
    tensors |= {name: attached.model.get_parameter(name) for name in attached.extra}
    config = {
        "format": "metier-adapter",
        "version": 1,
        "part": attached.built.id,
        "options": attached.built.options,
        "targets": list(attached.adapters),
        "trained": list(attached.extra),
        "base": _base_name(attached.model),
        "task_type": task_type(attached.model),
    }
    _write(folder, OWN, config, tensors)


def _write(folder: Path, names: tuple[str, str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    plain = {k: opened(v.detach(), whole=True).cpu().contiguous().clone() for k, v in tensors.items()}
    save_file(plain, folder / names[1], metadata={"format": "pt"})
    (folder / names[0]).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _base_name(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _peft_config(attached: Attached) -> dict[str, Any] | None:
    """PEFT's configuration, or ``None`` when PEFT cannot express what is attached."""
    adapters = list(attached.adapters.values())
    if not adapters or adapters[0].peft_names is None or not set(attached.extra) <= set(fresh_head(attached.model)):
        return None
    config = adapters[0].peft_config()
    if not config or any(a.peft_config() != config for a in adapters):
        return None
    return {
        **config,
        "base_model_name_or_path": _base_name(attached.model),
        "bias": "none",
        "fan_in_fan_out": any(hasattr(a.base, "transposed_from") for a in adapters),
        "inference_mode": True,
        "modules_to_save": sorted({n.split(".")[0] for n in attached.extra}) or None,
        "target_modules": shorten(attached.model, list(attached.adapters)),
        "task_type": task_type(attached.model),
    }


def load(model: nn.Module, folder: Path) -> Attached:
    """Attach the adapter in ``folder`` to ``model``."""
    if (folder / OWN[0]).is_file():
        config = _read(folder / OWN[0])
        if config.get("format") != "metier-adapter":
            raise UsageError(f"{folder / OWN[0]} is not a metier-adapter file")
        return _load_own(model, config, _tensors(folder / OWN[1]))
    if (folder / PEFT[0]).is_file():
        return _load_peft(model, folder, _read(folder / PEFT[0]), _tensors(folder / PEFT[1]))
    raise UsageError(f"{folder} holds no adapter", hint=f"Expected {PEFT[0]} or {OWN[0]} in it.")


def task(folder: Path) -> tuple[str, int]:
    """``("classify", number of labels)`` or ``("lm", 0)``: what the saved adapter was trained for."""
    names = OWN if (folder / OWN[0]).is_file() else PEFT
    if _read(folder / names[0]).get("task_type") != "SEQ_CLS":
        return "lm", 0
    heads = {
        k: t.shape[0] for k, t in _tensors(folder / names[1]).items()
        if k.removeprefix(PREFIX) in ("score.weight", "classifier.weight", "classifier.out_proj.weight")
    }  # fmt: skip
    if len(heads) != 1:
        raise UsageError(f"{folder}: cannot tell the number of labels from the saved head")
    return "classify", next(iter(heads.values()))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise UsageError(f"{path} is not valid JSON: {e}") from e


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UsageError(f"{path} is missing", hint="Pickled weights (.bin) are not read; save the adapter as safetensors.")
    return load_file(path)


def _load_own(model: nn.Module, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Attached:
    built = part.build("adapter", {config["part"].split("/")[1]: config["options"]})
    attached = adapt.attach(model, built, targets=list(config["targets"]))
    values = {f"{name}.{k}": t for name, a in attached.adapters.items() for k, t in a.own_state().items()}
    values |= {name: model.get_parameter(name) for name in attached.extra}
    _fill(values, tensors)
    return attached


def _load_peft(model: nn.Module, folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Attached:
    attached = _as_part(model, config, tensors)
    if attached is not None:
        return attached
    through = part.load("peft", "adapter")
    return through.load(model, folder)


def _as_part(model: nn.Module, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Attached | None:
    """The adapter as one of our own parts, or ``None`` when only PEFT itself can express it."""
    name = str(config.get("peft_type", "")).lower()
    if name not in {i.name for i in part.listing() if i.kind == "adapter"}:
        return None
    cls = part.load(name, "adapter")
    options = cls.from_peft(config) if getattr(cls, "peft_names", None) else None
    if options is None:
        return None
    plain = {k.removeprefix(PREFIX): t for k, t in tensors.items()}
    suffixes = tuple(f".{s}" for s in cls.peft_names.values())
    targets = {k.removesuffix(s) for k in plain for s in suffixes if k.endswith(s)}
    others = {k for k in plain if not k.endswith(suffixes)}
    if not targets or not others <= set(fresh_head(model)):
        return None
    missing = sorted(t for t in targets if t not in dict(model.named_modules()))
    if missing:
        raise UsageError(f"the adapter does not fit the model: there is no module {missing[0]}")
    attached = adapt.attach(model, part.build("adapter", {name: options}), targets=sorted(targets))
    values = {f"{n}.{s}": getattr(a, own) for n, a in attached.adapters.items() for own, s in cls.peft_names.items()}
    values |= {n: model.get_parameter(n) for n in attached.extra if n in others}
    _fill(values, plain)
    return attached


@torch.no_grad()
def _fill(values: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    odd = sorted(set(values) ^ set(stored))
    if odd:
        raise UsageError(f"the adapter does not fit the model: tensor {odd[0]} (of {len(odd)}) is on one side only")
    for name, target in values.items():
        if target.shape != stored[name].shape:
            shapes = f"{list(stored[name].shape)} in the file, {list(target.shape)} in the model"
            raise UsageError(f"the adapter does not fit the model: {name} is {shapes}")
        target.copy_(stored[name])
