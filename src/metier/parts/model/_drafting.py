"""Greedy decoding in which the blocks of multi-token prediction draft and the model checks."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metier.core import models


class Drafted(NamedTuple):
    """What speculative decoding made."""

    ids: Tensor
    """``[1, T + new]``: prompt and continuation."""
    drafted: int
    """First drafts that the model checked: guesses of the token after its own next one."""
    accepted: int
    """Of these, how many it would have chosen itself."""
    passes: int
    """Forward passes of the model, the prompt's included; plain decoding takes one for each new token."""


@torch.no_grad()
def speculate(model: Any, ids: Tensor, max_new_tokens: int, *, stop: int | None = None) -> Drafted:
    """Continue ``ids [1, T]`` greedily; the tokens are those of plain greedy decoding (up to ties within rounding).

    Each pass of the model checks the drafts of all depths at once and adds a token of its own. The model's keys and
    values are cached; the extra blocks are computed over the whole prefix for every draft, which is fine for
    measuring acceptance and wasteful for long texts. Ends before ``max_new_tokens`` at the token ``stop``.
    """
    training, length = model.training, ids.shape[1]
    model.eval()
    cache, drafted, accepted, passes = None, 0, 0, 1
    states, cache = _pass(model, ids, None)
    ids = torch.cat([ids, _best(model, states[:, -1:])], dim=1)
    while ids.shape[1] - length < max_new_tokens and stop not in ids[0, length:].tolist():
        drafts = _drafts(model, ids, states)
        hidden, cache = _pass(model, torch.cat([ids[:, -1:], drafts], dim=1), cache)
        own = _best(model, hidden)
        agreed = int((own[:, :-1] == drafts).long().cumprod(1).sum())
        drafted, accepted, passes = drafted + 1, accepted + (agreed > 0), passes + 1
        ids = torch.cat([ids, own[:, : agreed + 1]], dim=1)
        states = torch.cat([states, hidden[:, : agreed + 1]], dim=1)
        if agreed < drafts.shape[1]:
            cache.crop(agreed - drafts.shape[1])
    model.train(training)
    new = ids[0, length : length + max_new_tokens].tolist()
    end = length + (new.index(stop) + 1 if stop in new else len(new))
    return Drafted(ids[:, :end], drafted, accepted, passes)


def _pass(model: Any, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Last hidden states of new tokens, and the cache with them."""
    backbone = models.backbone(model)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    out = backbone(input_ids=ids, use_cache=True, **({} if cache is None else {name: cache}))
    return out.last_hidden_state, out[name]


def _drafts(model: Any, ids: Tensor, states: Tensor) -> Tensor:
    """The guess of every depth ``[1, depth]``; ``states [1, n, D]`` belong to all of ``ids [1, n + 1]`` but the last."""
    n, known = states.shape[1], ids.shape[1]
    angles = models.backbone(model).rotary_emb(states, position_ids=torch.arange(n, device=ids.device).unsqueeze(0))
    h = states
    for k, depth in enumerate(model.mtp.children(), 1):
        h = depth(h, models.embeddings(model)(ids[:, k : k + n]), angles, None)
        ids = torch.cat([ids, _best(model, depth.norm(h[:, -1:]))], dim=1)
    return ids[:, known:]


def _best(model: Any, h: Tensor) -> Tensor:
    return models.head(model)(h).argmax(-1)
