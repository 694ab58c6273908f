"""Where the parts of a transformer block are: attention modules, their projections, and the layers of the MLP.

Knows the names that the families of transformers use (Llama, Qwen, Gemma, Mistral, OLMo; GPT-2; BERT; OPT and Phi).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from metier.core import models
from metier.core.errors import UsageError

SEPARATE = (("q_proj", "k_proj"), ("query", "key"))
"""Names of the projections to queries and keys."""
VALUES = {"q_proj": "v_proj", "query": "value"}
"""Name of the projection to values, by that to queries."""
FUSED = "c_attn"
"""One projection whose output is queries, keys and values, a third each."""
OUTPUTS = ("o_proj", "c_proj", "out_proj", "dense")
FIRST = (("gate_proj", "up_proj"), ("c_fc",), ("fc1",))
SECOND = {"gate_proj": "down_proj", "c_fc": "c_proj", "fc1": "fc2"}
BEFORE_ATTENTION, BEFORE_MLP = ("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2")
AFTER_MLP = "post_feedforward_layernorm"
"""A norm on the output of the MLP, which Gemma 2 and 3 and OLMo 2 bring along."""
GROUPS = ("qkv", "proj", "fc1", "fc2")


class Place(NamedTuple):
    """A child of a module, so that it can be replaced."""

    parent: nn.Module
    name: str

    @property
    def module(self) -> nn.Module:
        """What is there now."""
        return getattr(self.parent, self.name)

    def put(self, module: nn.Module) -> None:
        """Replace it."""
        setattr(self.parent, self.name, module)


class Wrapper(nn.Module):
    """Stands in the place of a layer and does something with its output.

    The layer keeps its name inside (``…q_proj`` becomes ``…q_proj.q_proj``), so targets of adapters still find it
    and what they add comes before the wrapper.
    """

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, layer)

    @property
    def layer(self) -> nn.Module:
        """The wrapped layer."""
        return self.get_submodule(self.name)


def attentions(model: Any, where: str) -> list[Any]:
    """The attention modules of a model, in order. Raises ``UsageError`` when none has projections that are known."""
    found = [m for block in models.blocks(model) for m in block.modules() if projections(m)]
    if not found:
        raise UsageError(f"no attention with separate or c_attn projections in {type(model).__name__}", where=where)
    return found


def projections(module: nn.Module) -> tuple[str, ...]:
    """Names of an attention module's projections to queries and keys; empty for other modules."""
    if isinstance(module, Wrapper):
        return ()
    if hasattr(module, FUSED):
        return (FUSED,)
    return next((names for names in SEPARATE if all(hasattr(module, n) for n in names)), ())


def with_values(names: tuple[str, ...]) -> tuple[str, ...]:
    """The projections to queries, keys and values."""
    return names if names == (FUSED,) else (*names, VALUES[names[0]])


def head_size(attention: Any) -> int:
    """Width of one head."""
    return getattr(attention, "head_dim", None) or attention.attention_head_size


def width(layer: Any) -> int:
    """Number of outputs of a linear layer, wrapped or not."""
    while isinstance(layer, Wrapper):
        layer = layer.layer
    return layer.out_features if hasattr(layer, "out_features") else layer.nf


def linear(layer: Any) -> Any:
    """The linear layer inside wrappers and adapters."""
    while True:
        inner = layer.layer if isinstance(layer, Wrapper) else getattr(layer, "base_layer", None) or getattr(layer, "base", None)
        if not isinstance(inner, nn.Module):
            return layer
        layer = inner


def layers(block: nn.Module, where: str) -> dict[str, list[Place]]:
    """The linear layers of a block: ``qkv``, ``proj`` (after attention), ``fc1`` (two with a gate) and ``fc2``.

    Raises ``UsageError`` for a block that has them elsewhere, such as a mixture of experts.
    """
    attention = next((m for m in block.modules() if projections(m)), None)
    qkv = [Place(attention, n) for n in with_values(projections(attention))] if attention is not None else []
    found = {"qkv": qkv, "proj": _output(block, attention), "fc1": [], "fc2": []}
    first = next(_mlp(block), None)
    if first is not None:
        found["fc1"], found["fc2"] = first
    missing = [g for g in GROUPS if not found[g]]
    if missing:
        raise UsageError(f"no {' and '.join(missing)} layers that are known in {type(block).__name__}", where=where)
    return found


def _output(block: nn.Module, attention: nn.Module | None) -> list[Place]:
    names = {n: m for n, m in block.named_children()}
    if hasattr(names.get("attention"), "output"):  # BERT: beside the attention proper
        return [Place(names["attention"].output, "dense")]  # type: ignore[arg-type]
    return [Place(attention, n) for n in OUTPUTS if hasattr(attention, n)][:1] if attention is not None else []


def _mlp(block: Any) -> Iterator[tuple[list[Place], list[Place]]]:
    for parent in (getattr(block, "mlp", None), block):
        for names in FIRST:
            if parent is not None and all(hasattr(parent, n) for n in (*names, SECOND[names[0]])):
                yield [Place(parent, n) for n in names], [Place(parent, SECOND[names[0]])]
    if hasattr(block, "intermediate") and hasattr(block, "output"):
        yield [Place(block.intermediate, "dense")], [Place(block.output, "dense")]


def norm_before_attention(block: nn.Module, where: str) -> Place:
    """The norm on the input of the attention branch alone. Raises ``UsageError`` where there is no such norm.

    It must have a twin before the MLP: in parallel blocks one norm serves both branches.
    """
    for first, second in zip(BEFORE_ATTENTION, BEFORE_MLP, strict=True):
        if hasattr(block, first) and hasattr(block, second):
            return Place(block, first)
    raise UsageError(f"{type(block).__name__} has no norm before its attention alone", where=where)


def refuse_output_norms(model: Any, where: str) -> None:
    """Raise ``UsageError`` when the blocks already normalise the outputs of their branches."""
    if any(hasattr(b, AFTER_MLP) for b in models.blocks(model)):
        raise UsageError(f"{type(model).__name__} already normalises the outputs of its branches", where=where)
