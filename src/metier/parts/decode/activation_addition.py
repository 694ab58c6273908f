"""Activation addition: steer by adding a difference of activations (arXiv:2308.10248, section 3;
arXiv:2310.01405)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from metier.core import models
from metier.core.errors import UsageError
from metier.core.part import Index, part


@part("decode/activation-addition", paper="arXiv:2308.10248")
class ActivationAddition:
    """Add ``coefficient * (h(positive) - h(negative))`` to the residual stream entering block ``layer``.

    ``at: front`` adds the difference token by token to the first positions of the sequence (activation
    addition; the shorter prompt is padded on the right with spaces); ``at: every`` adds the difference at the
    last token to all positions, generated ones included (a reading vector from one pair). Leading padding is
    skipped. Outside ``attach`` the model is unchanged.
    """

    example = {"positive": "yes yes", "negative": "no", "layer": 1, "coefficient": 4.0}

    def __init__(
        self,
        *,
        positive: str,
        negative: str = "",
        layer: Index,
        coefficient: float = 1.0,
        at: Literal["front", "every"] = "front",
    ) -> None:
        self.positive, self.negative, self.layer, self.coefficient, self.at = (
            positive,
            negative,
            layer,
            coefficient,
            at,
        )

    @contextmanager
    def attach(self, model: Any, tokenizer: Any) -> Iterator[Any]:
        """The model steered, within the block. Raises ``UsageError`` when it has no such block."""
        blocks = models.blocks(model)
        if self.layer >= len(blocks):
            raise UsageError(
                f"layer = {self.layer}: the model has blocks 0 to {len(blocks) - 1}",
                where="decode/activation-addition",
            )
        vector = self.coefficient * self.difference(model, tokenizer)
        seen = _Seen()
        handles = [
            models.backbone(model).register_forward_pre_hook(seen.note, with_kwargs=True),
            blocks[self.layer].register_forward_pre_hook(
                lambda _, args, kw: _replaced(args, kw, self._add(_hidden(args, kw), vector, seen)),
                with_kwargs=True,
            ),
        ]
        try:
            yield model
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def difference(self, model: Any, tokenizer: Any) -> Tensor:
        """``[n, D]``: one row per position (``front``), or one for all (``every``)."""
        first, second = (_ids(tokenizer, text) for text in (self.positive, self.negative))
        if self.at == "every":
            return self._states(model, first)[-1:] - self._states(model, second)[-1:]
        space = tokenizer.encode(" ", add_special_tokens=False)[:1] or [tokenizer.pad_token_id]
        length = max(len(first), len(second))
        a, b = (ids + space * (length - len(ids)) for ids in (first, second))
        return self._states(model, a) - self._states(model, b)

    def _states(self, model: Any, ids: list[int]) -> Tensor:
        found: list[Tensor] = []
        handle = models.blocks(model)[self.layer].register_forward_pre_hook(
            lambda _, args, kw: found.append(_hidden(args, kw)), with_kwargs=True
        )
        modes = [m for m in model.modules() if m.training]
        try:
            model.eval()
            models.backbone(model)(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        finally:
            handle.remove()
            for m in modes:
                m.training = True
        return found[0][0]

    def _add(self, h: Tensor, vector: Tensor, seen: "_Seen") -> Tensor:
        vector = vector.to(h)
        if self.at == "every":
            return h + vector
        place = seen.past + torch.arange(h.shape[1], device=h.device) - seen.padding(h)
        inside = (place >= 0) & (place < len(vector))
        return h + vector[place.clamp(0, len(vector) - 1)] * inside.unsqueeze(-1)


class _Seen:
    """What the current forward pass says about positions: length of the cache, and the attention mask."""

    past = 0
    mask: Tensor | None = None

    def note(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        # transformers has called this argument past_key_values and cache
        cache = next((v for v in (*args, *kwargs.values()) if hasattr(v, "get_seq_length")), None)
        self.past = 0 if cache is None else int(cache.get_seq_length())
        self.mask = kwargs.get("attention_mask")

    def padding(self, h: Tensor) -> Tensor:
        """``[B, 1]`` number of padding tokens before each sequence."""
        if self.mask is None or self.mask.dim() != 2:
            return torch.zeros(h.shape[0], 1, dtype=torch.long, device=h.device)
        return self.mask.to(h.device).long().argmax(1, keepdim=True)


def _ids(tokenizer: Any, text: str) -> list[int]:
    start = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    return start + tokenizer.encode(text, add_special_tokens=False)


def _hidden(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _replaced(args: tuple, kwargs: dict[str, Any], h: Tensor) -> tuple[tuple, dict[str, Any]]:
    return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})
