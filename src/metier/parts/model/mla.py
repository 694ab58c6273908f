"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): of each token, one small latent vector
and one rotary key that all heads share are cached."""

import copy
from collections import namedtuple
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from metier.core import models
from metier.core.errors import UsageError
from metier.core.normed import Norm
from metier.core.part import Count, Index, part

FAMILIES = ("llama", "mistral", "qwen2", "gemma")
Sizes = namedtuple("Sizes", "nope rope value kv q")


@part("model/mla", paper="arXiv:2405.04434", rows=(12,))
def mla(
    model: Any, *, kv_lora_rank: Count | None = None, q_lora_rank: Count | None = None, qk_nope_head_dim: Count | None = None,
    qk_rope_head_dim: Index | None = None, v_head_dim: Count | None = None, absorb: Literal["auto", "always", "never"] = "auto",
) -> Any:  # fmt: skip
    """Keys and values of all heads are up-projections of one small cached vector per token, beside one rotary key.

    ``c = RMSNorm(W_DKV h)``, ``[k_n; v]_i = W_UKV c``, ``k_r = RoPE(W_KR h)``, the same for all heads;
    ``o_i = softmax([q_n; q_r]_i [k_n; k_r]_iᵀ / √(d_n + d_r)) v_i``. The cache holds ``c [B, 1, T, d_c]``, ``k_r [B, 1, T, d_r]``
    in the places of keys and values: ``d_c + d_r`` numbers per token and layer instead of ``2 H_kv d_h``. ``None`` takes V3's
    proportions from the model's head width: ``d_c = 4 d_h``, ``d_n = d_v = d_h``, ``d_r = d_h / 2``; queries have no latent of
    their own unless ``q_lora_rank`` is given (V3: 3 d_c). ``qk_rope_head_dim = 0`` leaves out positions.

    ``absorb`` is the form used in evaluation: keys and values expanded for all cached tokens, or ``W_UK`` multiplied into the
    queries and ``W_UV`` after the weights, so that attention runs on the latents. ``auto`` takes what needs fewer multiplications
    when there is a cache (absorbed for a new token, expanded for a prompt); ``always`` absorbs without one too. Training expands.

    New weights come from N(0, initializer_range²), without biases: a trained model loses its attention. Names are
    those of DeepSeek's release; rotary dimensions lie in halves as in Llama, its weights interleave them. Changes
    ``model`` in place. Raises ``UsageError`` for families other than Llama, Mistral, Qwen2 and Gemma, sliding windows,
    projections changed before, rotary scaling with a softmax temperature, and an odd ``qk_rope_head_dim``.
    """
    found: list[Any] = [m for m in model.modules() if hasattr(getattr(m, "self_attn", None), "k_proj")]
    _check(model, found, qk_rope_head_dim)
    width, like, backbone = found[0].self_attn.head_dim, found[0].self_attn.o_proj.weight, models.backbone(model)
    rope = width // 4 * 2 if qk_rope_head_dim is None else qk_rope_head_dim
    sizes = Sizes(qk_nope_head_dim or width, rope, v_head_dim or width, kv_lora_rank or 4 * width, q_lora_rank)
    for block in found:
        block.self_attn = LatentAttention(model.config, block.self_attn.layer_idx, sizes, absorb).to(like)
    if rope:  # the backbone computes the angles once for all blocks
        config = copy.copy(model.config)
        config.head_dim = rope
        backbone.rotary_emb = type(backbone.rotary_emb)(config=config).to(like.device)
    return model


def _check(model: Any, found: list[Any], rope: int | None) -> None:
    where, config = "model/mla", model.config
    kinds = set(getattr(config, "layer_types", None) or ())
    sliding = kinds - {"full_attention"} or (not kinds and getattr(config, "sliding_window", None))
    if config.model_type not in FAMILIES or not found or sliding:
        raise UsageError(f"{type(model).__name__} has no full attention as in {', '.join(FAMILIES)}", where=where)
    if any(type(getattr(m.self_attn, f"{x}_proj", None)) is not nn.Linear for m in found for x in "qkvo"):
        raise UsageError("another part has changed the attention's projections", where=where, hint="Put model/mla first.")
    if models.backbone(model).rotary_emb.attention_scaling != 1:
        raise UsageError("rotary scaling that changes the softmax temperature is not supported", where=where)
    if rope is not None and rope % 2:
        raise UsageError(f"qk_rope_head_dim = {rope}: must be even", where=where)


class LatentAttention(nn.Module):
    """Attention of one block with the interface of transformers' Llama attention."""

    is_causal, num_key_value_groups = True, 1

    def __init__(self, config: Any, layer_idx: int, sizes: Sizes, absorb: str) -> None:
        super().__init__()
        self.config, self.layer_idx, self.sizes, self.absorb = config, layer_idx, sizes, absorb
        s, d, eps, heads = sizes, config.hidden_size, config.rms_norm_eps, config.num_attention_heads
        self.heads, self.scaling, out = heads, (s.nope + s.rope) ** -0.5, heads * (s.nope + s.rope)
        if s.q is None:
            self.q_proj = nn.Linear(d, out, bias=False)
        else:
            self.q_a_proj, self.q_b_proj = nn.Linear(d, s.q, bias=False), nn.Linear(s.q, out, bias=False)
            self.q_a_layernorm = Norm(s.q, 1, False, "shared", eps)
        self.kv_a_proj_with_mqa = nn.Linear(d, s.kv + s.rope, bias=False)
        self.kv_a_layernorm = Norm(s.kv, 1, False, "shared", eps)
        self.kv_b_proj = nn.Linear(s.kv, self.heads * (s.nope + s.value), bias=False)
        self.o_proj = nn.Linear(self.heads * s.value, d, bias=False)
        for linear in [m for m in self.modules() if isinstance(m, nn.Linear)]:
            nn.init.normal_(linear.weight, std=config.initializer_range)
        self.register_forward_pre_hook(_known, with_kwargs=True)

    def forward(self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any = None, cache: Any = None) -> Any:
        """``[B, T, D]`` -> ``[B, T, D]``, and attention weights or ``None``; extends ``cache``."""
        s = self.sizes
        q = self.q_proj(hidden_states) if s.q is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        q_n, q_r = q.unflatten(-1, (self.heads, -1)).transpose(1, 2).split([s.nope, s.rope], dim=-1)
        latent, k_r = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1).split([s.kv, s.rope], dim=-1)
        latent = self.kv_a_layernorm(latent)
        if s.rope:
            q_r, k_r = _rotated(q_r, *position_embeddings), _rotated(k_r, *position_embeddings)
        if cache is not None:
            latent, k_r = cache.update(latent, k_r, self.layer_idx)
        if self._absorbs(q_n.shape[2], latent.shape[2], cache is not None, attention_mask):
            return self.o_proj(self._absorbed(q_n, q_r, latent, k_r, attention_mask)), None
        k_n, v = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.heads, -1)).transpose(1, 2).split([s.nope, s.value], -1)
        q, k = torch.cat([q_n, q_r], dim=-1), torch.cat([k_n, k_r.expand(-1, self.heads, -1, -1)], dim=-1)
        dropout = self.config.attention_dropout if self.training else 0.0
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling)
        return self.o_proj(out.flatten(2)), weights

    def _absorbs(self, new: int, seen: int, cached: bool, mask: Any) -> bool:
        """Whether to attend to the latents: by the number of multiplications for ``new`` tokens that see ``seen``."""
        up, s, pair = self.kv_b_proj, self.sizes, self.sizes.nope + self.sizes.value
        plain = type(up) is nn.Linear and not (up._forward_hooks or up._forward_pre_hooks)  # no adapter on it
        if self.training or self.absorb == "never" or not plain or (mask is not None and getattr(mask, "ndim", 0) != 4):
            return False
        absorbed = new * (seen * (2 * s.kv + s.rope) + s.kv * pair)
        expanded = seen * s.kv * pair + new * seen * (pair + s.rope)
        return self.absorb == "always" or (cached and absorbed < expanded)

    def _absorbed(self, q_n: Tensor, q_r: Tensor, latent: Tensor, k_r: Tensor, mask: Tensor | None) -> Tensor:
        """All heads attend to the latents as to one head of width ``d_c + d_r``; ``[B, T, H d_v]``."""
        up = self.kv_b_proj.weight.to(latent.dtype).unflatten(0, (self.heads, -1))
        up_k, up_v = up.split([self.sizes.nope, self.sizes.value], dim=1)
        q = torch.cat([q_n @ up_k, q_r], dim=-1).flatten(1, 2) * self.scaling
        scores = (q @ torch.cat([latent, k_r], dim=-1).squeeze(1).mT).unflatten(1, (self.heads, -1))
        if mask is None and scores.shape[2] > 1:
            mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            low = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~mask, low) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(latent.dtype)
        out = (weights.flatten(1, 2) @ latent.squeeze(1)).unflatten(1, (self.heads, -1))
        return (out @ up_v.mT).transpose(1, 2).flatten(2)


def _known(_: nn.Module, args: tuple, given: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments that matter; transformers passes more, and used to call the cache ``past_key_values``."""
    cache = given.get("cache", given.get("past_key_values"))
    return args, {**{k: v for k, v in given.items() if k in LatentAttention.forward.__annotations__}, "cache": cache}


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [B, H, T, d_r]`` turned by angles ``[B, T, d_r]``; dimension ``j`` pairs with ``j + d_r / 2``."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-b, a], dim=-1) * sin.unsqueeze(1)
