"""Attention by segments: each stretch of a row attends to its own keys in a call of its own.

With a mask, attention computes every pair of positions of a row, also those that do not see each other. Here a prompt or
a plain sequence is one causal call, and an answer is one call over the keys of its prompt and its own. Many sequences in a
long row cost a fraction then; a single group in a row is better computed at once, so segments are used where they pay.

The boolean mask is still there and says the same: it carries the segments along, and whoever gets a copy of it, without
them, computes with the mask.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metier.core.layout import Layout

NAME = "segments"
ATTRIBUTE = "metier_segments"
WORTH = 1.4
"""Pairs of positions in the rows, relative to those in the segments' calls, from which segments are faster."""
OTHER = ("s_aux", "position_bias", "softcap")
"""Arguments of attention functions that are left to transformers' own."""


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of one row, group and branch; numbers of segments count through all rows."""

    length: int
    prompt: int | None
    """The segment of the prompt before this answer."""
    mask: Tensor | None
    """``[length, keys]`` bool over the keys of prompt and segment; ``None``: one causal sequence."""
    padding: bool = False


def attach(mask: Tensor, layout: Layout, window: int | None = None) -> Tensor:
    """``mask`` itself, ``[R, 1, T, T]`` bool; it carries the segments of the layout where they pay."""
    found = segments(layout, window)
    if found is not None and mask.numel() >= WORTH * pairs(found):
        setattr(mask, ATTRIBUTE, found)
    return mask


def pairs(found: list[Segment]) -> int:
    """Pairs of a query and a key that the calls of these segments compute."""
    prompts = [0 if s.prompt is None else found[s.prompt].length for s in found]
    return sum(s.length * (s.length + before) for s, before in zip(found, prompts, strict=True) if not s.padding)


def segments(layout: Layout, window: int | None = None) -> list[Segment] | None:
    """The segments of all rows, one after another; ``None`` when tokens of a branch do not stand together.

    With ``window``, a token sees only those nearer than that, counted along the sequence.
    """
    found: list[Segment] = []
    position = layout.position_ids.cpu()
    for r, (groups, branches) in enumerate(zip(layout.group.tolist(), layout.branch.tolist(), strict=True)):
        numbers: dict[tuple[int, int], int] = {}
        places: dict[int, slice] = {}
        for key, place in _stretches(groups, branches):
            if key in numbers:
                return None
            number = len(found)
            prompt = numbers.get((key[0], 0)) if key[1] else None
            before = position[r, places[prompt]] if prompt is not None else position.new_empty(0)
            mask = _mask(before, position[r, place], window)
            numbers[key], places[number] = number, place
            found.append(Segment(place.stop - place.start, prompt, _on(mask, layout), padding=key[0] == 0))
    return found


def _stretches(groups: list[int], branches: list[int]) -> list[tuple[tuple[int, int], slice]]:
    """``(group, branch)`` and place of every longest stretch of a row; padding has no branches."""
    keys = [(g, b if g else 0) for g, b in zip(groups, branches, strict=True)]
    starts = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
    return [(keys[a], slice(a, b)) for a, b in zip(starts, [*starts[1:], len(keys)], strict=True)]


def _mask(before: Tensor, own: Tensor, window: int | None) -> Tensor | None:
    keys = torch.cat([before, own])
    near = torch.ones(len(own), len(keys), dtype=torch.bool)
    if window is not None:
        near = own.unsqueeze(1) - keys < window
    if not len(before) and bool(near.all()):
        return None
    return near.tril(len(before))


def _on(mask: Tensor | None, layout: Layout) -> Tensor | None:
    return None if mask is None else mask.to(layout.group.device)


# --- computing it ----------------------------------------------------------------------------------------------


def register() -> None:
    """Make the implementation known to transformers, under :data:`NAME`; masks are made as for SDPA."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers calls it: ``[R, H, T, d]`` queries, ``[R, G, T, d]`` keys and values -> ``[R, T, H, d]``."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found = getattr(attention_mask, ATTRIBUTE, None)
    if found is None or query.shape[2] != key.shape[2] or any(more.get(k) is not None for k in OTHER):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)
    rows, heads, columns, _ = query.shape
    q, k, v = (_pieces(x, found) for x in (query, key, value))
    out: list[Tensor] = []
    for i, s in enumerate(found):
        if s.padding:
            out.append(v[i].new_zeros(s.length, heads, v[i].shape[-1]))
            continue
        keys, values = (k[i], v[i]) if s.prompt is None else (torch.cat([x[s.prompt], x[i]]) for x in (k, v))
        out.append(_attention(q[i], keys, values, s.mask, dropout, scaling))
    return torch.cat(out).view(rows, columns, heads, -1), None


def _pieces(x: Tensor, found: list[Segment]) -> tuple[Tensor, ...]:
    """``[R, H, T, d]`` -> for every segment ``[length, H, d]``."""
    return x.transpose(1, 2).flatten(0, 1).split([s.length for s in found])


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scaling: float | None) -> Tensor:
    """``[n, H, d]`` queries, ``[m, G, d]`` keys and values -> ``[n, H, d]``."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.squeeze(0).transpose(0, 1)
