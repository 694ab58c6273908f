"""Contract of adapters: on a tiny Llama and a tiny GPT-2, the promises of :mod:`metier.core.adapt` hold."""

import copy
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metier.core import part
from metier.core.adapt import Attached, LinearAdapter, attach, load_adapter
from metier.core.errors import UsageError
from metier.core.part import Built

OPTIONS: dict[str, Mapping[str, Any]] = {"adapter/peft": {"config": "IA3Config"}}
"""Options for parts that cannot be made without any."""
START = 2e-2
"""Adapters that start near the base, not at it, may differ by this much at the start (logits of tiny
models)."""


def tiny(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A random two-block model of width 32 over 61 tokens, in evaluation mode."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if family == "gpt2":
            config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
            model: Any = GPT2LMHeadModel(config)
        else:
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                    bos_token_id=0, eos_token_id=0, pad_token_id=0,
                )
            )  # fmt: skip
    return model.to(dtype).eval()


def tokens() -> Tensor:
    """Token ids ``[3, 11]``."""
    return torch.randint(0, 61, (3, 11), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Logits of :func:`tokens`."""
    return model(tokens()).logits.clone()


def put(built: Built, model: Any, seed: int = 0) -> Attached:
    """``attach`` with a seeded global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return attach(model, built)


@torch.no_grad()
def disturb(attached: Attached, size: float = 0.05) -> None:
    """Move every trainable parameter, as training would."""
    g = torch.Generator().manual_seed(3)
    for p in attached.model.parameters():
        if p.requires_grad:
            p.add_(size * torch.randn(p.shape, generator=g).to(p))


def check(ref: str, options: Mapping[str, Any] | None = None, families: tuple[str, ...] = ("llama", "gpt2")) -> list[str]:
    """Run the contract on the part ``ref``. Returns the names of the checks; raises ``AssertionError``."""
    chosen = OPTIONS.get(ref, {}) if options is None else options
    built = part.build("adapter", {ref.split("/")[1]: dict(chosen)})
    for family in families:
        for test in CHECKS:
            test(built, family)
    return [t.__name__.removeprefix("_") for t in CHECKS]


def _starts_at_the_base(built: Built, family: str) -> None:
    model = tiny(family)
    before = logits(model)
    attached = put(built, model)
    gap = (logits(attached.model) - before).abs().max()
    assert gap <= START, f"{built.id} changes the output at the start by {float(gap):.3g}"


def _disabled_is_the_base(built: Built, family: str) -> None:
    model = tiny(family)
    before = logits(model)
    attached = put(built, model)
    disturb(attached)
    tuned = logits(attached.model)
    assert not torch.allclose(tuned, before, atol=1e-4), f"{built.id} has no effect"
    with attached.disabled() as base:
        torch.testing.assert_close(logits(base), before, rtol=0, atol=1e-5)
    assert torch.equal(logits(attached.model), tuned), f"{built.id} is another one after disabled()"


def _only_the_adapter_trains(built: Built, family: str) -> None:
    model = tiny(family)
    base = {id(p): (n, p) for n, p in model.named_parameters()}  # holding p: ids are reused
    attached = put(built, model)
    disturb(attached)
    attached.model(tokens()).logits.float().pow(2).mean().backward()
    declared = {id(attached.model.get_parameter(n)) for n in attached.extra}
    trainable = [p for p in attached.model.parameters() if p.requires_grad]
    assert trainable, f"{built.id} has nothing to train"
    for p in trainable:
        assert p.grad is not None, f"{built.id}: a trainable parameter gets no gradient"
        assert torch.isfinite(p.grad).all(), f"{built.id}: a gradient is not finite"
        assert id(p) not in base or id(p) in declared, f"{built.id} trains {base[id(p)][0]} of the base"
    assert any(bool(p.grad.ne(0).any()) for p in trainable if p.grad is not None), f"{built.id}: all gradients are zero"
    assert all(p.grad is None for p in attached.model.parameters() if not p.requires_grad)


def _gradient_flows_at_the_start(built: Built, family: str) -> None:
    attached = put(built, tiny(family))
    attached.model(tokens()).logits.float().pow(2).mean().backward()
    got = [p.grad for p in attached.model.parameters() if p.grad is not None]
    assert any(bool(g.ne(0).any()) for g in got), f"{built.id} cannot leave its start: all gradients are zero"


def _merged_is_the_same(built: Built, family: str) -> None:
    model = tiny(family)
    plain = {n: type(m) for n, m in model.named_modules()}
    attached = put(built, model)
    disturb(attached)
    tuned = logits(attached.model)
    if not all(a.mergeable for a in attached.adapters.values()):
        try:
            attached.merge()
        except UsageError:
            return
        raise AssertionError(f"{built.id} says it cannot be merged, and merges")
    merged = attached.merge()
    torch.testing.assert_close(logits(merged), tuned, rtol=1e-4, atol=1e-4)
    assert {n: type(m) for n, m in merged.named_modules()} == plain, f"{built.id} leaves other modules after merging"


def _saves_and_loads_exactly(built: Built, family: str) -> None:
    attached = put(built, tiny(family))
    disturb(attached)
    with tempfile.TemporaryDirectory() as folder:
        attached.save(folder)
        again = load_adapter(tiny(family), folder)
    assert again.count == attached.count, f"{built.id}: {attached.count} parameters saved, {again.count} loaded"
    assert torch.equal(logits(again.model), logits(attached.model)), f"{built.id} is another one after loading"


def _counts(built: Built, family: str) -> None:
    attached = put(built, tiny(family))
    assert attached.count == sum(p.numel() for p in attached.model.parameters() if p.requires_grad) > 0
    for name, a, b in attached.pairs():
        assert a.shape[0] == b.shape[1], f"{built.id}: the factors of {name} do not fit"


def _targets_must_match(built: Built, family: str) -> None:
    try:
        attach(tiny(family), built, targets=["no_such_layer_*"])
    except UsageError:
        return
    raise AssertionError(f"{built.id} accepts a target that matches nothing")


def _same_seed_same_start(built: Built, family: str) -> None:
    states = [{n: p for n, p in put(built, tiny(family), seed).model.named_parameters() if p.requires_grad} for seed in (5, 5)]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0]), f"{built.id}: one seed, two starts"


def _half_precision_base(built: Built, family: str) -> None:
    attached = put(built, tiny(family, torch.bfloat16))
    disturb(attached)
    out = attached.model(tokens()).logits
    assert out.dtype == torch.bfloat16, f"{built.id} changes the type of the output"
    assert torch.isfinite(out).all()
    if isinstance(next(iter(attached.adapters.values()), None), LinearAdapter):
        own = [p for a in attached.adapters.values() for n, p in a.named_parameters() if not n.startswith("base.")]
        assert all(p.dtype == torch.float32 for p in own), f"{built.id} trains in half precision"


def _survives_a_copy(built: Built, family: str) -> None:
    attached = put(built, tiny(family))
    twin: nn.Module = copy.deepcopy(attached.model)
    assert torch.equal(logits(twin), logits(attached.model))


CHECKS = (
    _starts_at_the_base,
    _disabled_is_the_base,
    _only_the_adapter_trains,
    _gradient_flows_at_the_start,
    _merged_is_the_same,
    _saves_and_loads_exactly,
    _counts,
    _targets_must_match,
    _same_seed_same_start,
    _half_precision_base,
    _survives_a_copy,
)
