"""Which modules an adapter is put on: keywords and globs over module names, resolved to full names."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

from metier.core.errors import UsageError, unknown

Targets = str | list[str] | None
HEADS = ("score", "classifier", "pre_classifier")
LINEAR_WORDS = ("all-linear", "attention", "mlp")
SUBLAYER_WORDS = ("sublayers", "attention", "mlp", "blocks")
MLP_NAMES = ("mlp", "ffn", "feed_forward", "feedforward", "block_sparse_moe", "moe")


def is_linear(module: nn.Module) -> bool:
    """``nn.Linear``, transformers' ``Conv1D``, or a layer that presents itself as linear (e.g. quantised)."""
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return True
    return all(isinstance(getattr(module, a, None), int) for a in ("in_features", "out_features"))


def fresh_head(model: nn.Module) -> list[str]:
    """Names of the parameters of a sequence classifier's head (empty for other models)."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    return [n for n, _ in model.named_parameters() if n.split(".")[0] in HEADS]


def task_type(model: nn.Module) -> str | None:
    """PEFT's word for what the model is for, from its class name."""
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def linear_targets(model: nn.Module, targets: Targets = None) -> list[str]:
    """Full names of the linear layers that ``targets`` choose, in the model's order.

    ``all-linear`` (default), ``attention`` and ``mlp`` choose among the layers within the transformer blocks;
    a glob chooses among all linear layers, by full name or by its end. Raises ``UsageError`` when an entry
    matches nothing.
    """
    named = [n for n, m in model.named_modules() if is_linear(m) and not _in_head(model, n)]
    prefixes = block_names(model)
    inside = {n: n[len(p) + 1 :] for n in named for p in prefixes if n.startswith(p + ".")}

    def keyword(word: str) -> list[str]:
        if word == "all-linear":
            return list(inside)
        return [n for n, local in inside.items() if _is_attention(local) == (word == "attention")]

    return _select(targets or "all-linear", LINEAR_WORDS, keyword, named)


def sublayer_targets(model: nn.Module, targets: Targets = None) -> list[str]:
    """Full names of the sub-layers (or whole blocks, or anything a glob names) that ``targets`` choose."""
    prefixes = block_names(model)

    def keyword(word: str) -> list[str]:
        if word == "blocks":
            return prefixes
        wanted = ("attention", "mlp") if word == "sublayers" else (word,)
        return [s for p in prefixes for w in wanted if (s := _sublayer(model, p, w)) is not None]

    named = [n for n, _ in model.named_modules() if n and not _in_head(model, n)]
    return _select(targets or "sublayers", SUBLAYER_WORDS, keyword, named)


def block_names(model: nn.Module) -> list[str]:
    """Full names of the transformer blocks, first to last."""
    from metier.core.models import blocks

    wanted = {id(b) for b in blocks(model)}
    return [n for n, m in model.named_modules() if id(m) in wanted]


def shorten(model: nn.Module, names: list[str]) -> list[str]:
    """Last components of ``names`` where those pick out exactly ``names``; otherwise ``names`` themselves."""
    ends = {n.rsplit(".", 1)[-1] for n in names}
    picked = [n for n, _ in model.named_modules() if n and n.rsplit(".", 1)[-1] in ends]
    return sorted(ends) if sorted(picked) == sorted(names) else names


def _is_attention(local: str) -> bool:
    return any("attn" in c or "attention" in c for c in local.lower().split("."))


def _in_head(model: nn.Module, name: str) -> bool:
    return name.split(".")[0] in HEADS and type(model).__name__.endswith("ForSequenceClassification")


def _sublayer(model: nn.Module, block: str, word: str) -> str | None:
    """The module whose output is the sub-layer's, before the residual sum (and before the norm in post-norm
    models)."""
    children = [n for n, _ in model.get_submodule(block).named_children()]
    if word == "attention":
        found = next((c for c in children if _is_attention(c) and "norm" not in c.lower()), None)
    else:
        found = next((c for c in children if c.lower() in MLP_NAMES), None)
        # BERT has no module around its feed-forward layers: their output is that of ``output.dense``
        found = found or ("output" if "output" in children else None)
    if found is None:
        return None
    path = f"{block}.{found}"
    for tail in ("output.dense", "dense"):
        # BERT's modules hold the residual sum and the norm; the sub-layer proper ends at this projection
        if (tail == "output.dense" or found == "output") and _has(model, f"{path}.{tail}"):
            return f"{path}.{tail}"
    return path


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _select(
    targets: str | Iterable[str],
    words: tuple[str, ...],
    keyword: Callable[[str], list[str]],
    named: list[str],
) -> list[str]:
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        if target in words:
            found = keyword(target)
        else:
            found = [n for n in named if fnmatchcase(n, target) or fnmatchcase(n, f"*.{target}")]
        if not found and target in words:
            raise UsageError(f"the model has nothing for {target!r}", where="adapter.targets")
        if not found:
            valid = {*words, *(n.rsplit(".", 1)[-1] for n in named if not n.rsplit(".", 1)[-1].isdigit())}
            raise unknown("target", target, valid, where="adapter.targets")
        chosen.update(found)
    if not chosen:
        raise UsageError("no target is given", where="adapter.targets")
    return [n for n in named if n in chosen]
