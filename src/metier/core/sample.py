"""Answers sampled from a model, many at once: the prompt is computed once and its cache serves all of its answers.

    sample(model, tokenizer, prompts, number=4, max_new_tokens=64, temperature=1.0, seed=0) -> list[list[Answer]]

Answer ``k`` of prompt ``i`` is drawn with its own uniform numbers, those of ``(seed, i, k)``, by inversion of the cumulative
distribution. So it does not depend on how the work is split into batches or processes, up to the rounding of the logits.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metier.core import models
from metier.core.errors import UsageError
from metier.core.scores import evaluating

BATCH_TOKENS = 16384
"""Positions computed at once by default; the cache of keys and values grows with it."""


@dataclass(frozen=True)
class Answer:
    """One sampled answer."""

    ids: np.ndarray
    """``[T]`` int32, with the end token when it was reached."""
    text: str
    """Without special tokens."""
    ended: bool
    """Whether the end token came before ``max_new_tokens``."""
    logps: np.ndarray = field(repr=False, compare=False)
    """``[T]`` float32 log-probabilities of the ids under the model itself (temperature 1, all tokens)."""


@dataclass(frozen=True)
class Mixture:
    """A second model of the same vocabulary, whose logits are mixed in at every token: ``(1 - share) z + share z'``."""

    model: Any
    share: float
    switched: Callable[[], AbstractContextManager] = contextlib.nullcontext
    """Entered around the second model's passes: switches the adapter of the first off, when both are one model."""


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, prompts: Sequence[np.ndarray], *, number: int, max_new_tokens: int, temperature: float = 1.0,
    top_p: float = 1.0, seed: int = 0, allow_empty: bool = True, batch_tokens: int = BATCH_TOKENS,
    end_ids: Sequence[int] | None = None, mixture: Mixture | None = None, numbers: Sequence[int] | None = None,
) -> list[list[Answer]]:  # fmt: skip
    """``number`` answers to each of ``prompts`` (token ids), in their order.

    Temperature 0 takes the most probable token, and all answers to a prompt are then equal. ``top_p < 1`` draws from the
    smallest set of tokens whose probability reaches it. ``end_ids`` are the tokens that end an answer; default: what
    :func:`end_tokens` finds. Without ``allow_empty`` none of them is drawn first. With a ``mixture`` the logits are those of
    both models, also for the answers' ``logps``. With ``numbers`` the prompts are those of these places
    among more, and are answered as there. Dropout is off meanwhile; no global random numbers are used.

    Raises ``UsageError`` for an empty prompt, a negative temperature, a ``top_p`` outside (0, 1], or a model that does not
    generate.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise UsageError(f"temperature = {temperature:g} and top_p = {top_p:g}: expected temperature >= 0 and 0 < top_p <= 1")
    if min(map(len, prompts), default=1) == 0:
        raise UsageError("a prompt is empty")
    if getattr(model, "can_generate", None) is None or not model.can_generate():
        raise UsageError(f"{type(model).__name__} does not generate text")
    drawer = _Drawer(
        temperature, top_p, max_new_tokens, seed, tuple(end_ids or end_tokens(tokenizer, model)), mixture, allow_empty,
        range(len(prompts)) if numbers is None else numbers,
    )  # fmt: skip
    found: dict[tuple[int, int], Answer] = {}
    with evaluating(model), evaluating(mixture.model) if mixture else contextlib.nullcontext():
        for jobs in _batches([len(p) + max_new_tokens for p in prompts], number, batch_tokens):
            for job, (ids, ended, logps) in zip(jobs, drawer.run(model, tokenizer, prompts, jobs), strict=True):
                found[job] = Answer(ids, tokenizer.decode(ids, skip_special_tokens=True), ended, logps)
    return [[found[i, k] for k in range(number)] for i in range(len(prompts))]


def end_tokens(tokenizer: Any, model: Any = None) -> list[int]:
    """Ids that end an answer: end of text, end of turn of the chat template, and what the model's generation settings say."""
    found = [tokenizer.eos_token_id]
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found += configured if isinstance(configured, list | tuple) else [configured]
    if getattr(tokenizer, "chat_template", None):
        found.append(_end_of_turn(tokenizer))
    return sorted({t for t in found if t is not None})


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts after an answer, if there is one."""
    from metier.core.data.formats import Message
    from metier.core.data.template import segments

    try:
        *_, last = (s for s in segments(tokenizer, (Message("user", "a"), Message("assistant", "a"))) if s.loss)
    except UsageError:
        return None
    ids = tokenizer(last.text, add_special_tokens=False)["input_ids"]
    return ids[-1] if ids and ids[-1] in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} else None


Job = tuple[int, int]
"""Prompt and number of an answer."""


def _batches(lengths: Sequence[int], number: int, batch_tokens: int) -> Iterator[list[Job]]:
    """Answers computed together: neighbours by length of the prompt, so that little is padding."""
    jobs: list[Job] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for k in range(number):
            if jobs and (len(jobs) + 1) * lengths[jobs[0][0]] > batch_tokens:
                yield jobs
                jobs = []
            jobs.append((i, k))
    if jobs:
        yield jobs


@dataclass(frozen=True)
class _Drawer:
    """How tokens are drawn, and the loop over positions."""

    temperature: float
    top_p: float
    steps: int
    seed: int
    ends: tuple[int, ...]
    mixture: Mixture | None = None
    allow_empty: bool = True
    numbers: Sequence[int] = ()
    """Of the prompts, in the random numbers."""

    def run(
        self, model: Any, tokenizer: Any, prompts: Sequence[np.ndarray], jobs: Sequence[Job]
    ) -> list[tuple[np.ndarray, bool, np.ndarray]]:
        """``(ids, ended, logps)`` of every job."""
        device: Any = models.embeddings(model).weight.device
        ends = torch.tensor(self.ends, device=device, dtype=torch.long)
        uniform = self._uniform(jobs).to(device)
        reader = _reader(model, self.mixture, prompts, jobs, tokenizer.pad_token_id or 0, device)
        ids = torch.zeros(len(jobs), self.steps, dtype=torch.long, device=device)
        logps = torch.zeros(len(jobs), self.steps, device=device)
        length = torch.full((len(jobs),), self.steps, device=device)
        ended = torch.zeros(len(jobs), dtype=torch.bool, device=device)
        active = torch.arange(len(jobs), device=device)
        for t in range(self.steps):
            z = reader.logits()
            barred = t == 0 and not self.allow_empty
            token = self._draw(z.index_fill(1, ends, -torch.inf) if barred else z, uniform[active, t])
            ids[active, t] = token
            logps[active, t] = (z.gather(1, token[:, None])[:, 0] - z.logsumexp(1)).float()
            done = torch.isin(token, ends) & ~ended[active]
            length[active[done]] = t + 1
            ended[active[done]] = True
            going = ~ended[active]
            alive = int(going.sum())
            if alive == 0 or t + 1 == self.steps:
                break
            if alive <= 0.75 * len(active):  # rows that have ended are dropped now and then, not each time
                reader.keep(going)
                active, token = active[going], token[going]
            reader.push(token)
        rows = zip(ids.cpu(), length.tolist(), ended.tolist(), logps.cpu(), strict=True)
        return [(i[:n].numpy().astype(np.int32), e, p[:n].numpy().copy()) for i, n, e, p in rows]

    def _uniform(self, jobs: Sequence[Job]) -> Tensor:
        """``[jobs, steps]`` in [0, 1): each row from its own generator."""
        if self.temperature == 0:
            return torch.zeros(len(jobs), self.steps)
        sources = (np.random.default_rng([self.seed, self.numbers[i], k]) for i, k in jobs)
        return torch.from_numpy(np.stack([source.random(self.steps) for source in sources]))

    def _draw(self, z: Tensor, u: Tensor) -> Tensor:
        """Token ``[B]`` of logits ``[B, V]``: the first whose cumulative probability exceeds ``u`` times the total."""
        if self.temperature == 0:
            return z.argmax(1)
        exact = torch.float32 if z.device.type == "mps" else torch.float64
        p = (z / self.temperature).softmax(1).to(exact)
        if self.top_p < 1:
            high, order = p.sort(dim=1, descending=True, stable=True)
            out = high.cumsum(1) - high >= self.top_p
            p = p.masked_fill(out.scatter(1, order, out), 0)
        mass = p.cumsum(1)
        total = mass[:, -1:]
        at = torch.minimum(u.to(exact)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(mass, at, right=True)[:, 0]


def _reader(model: Any, mixture: Mixture | None, *what: Any) -> Any:
    reader = _Reader(model, *what)
    return reader if mixture is None else _Mixed(reader, mixture, *what)


class _Reader:
    """Next-token logits of several rows: left-padded prompts, each computed once, then one token at a time."""

    def __init__(self, model: Any, prompts: Sequence[np.ndarray], jobs: Sequence[Job], pad: int, device: torch.device) -> None:
        from transformers import DynamicCache

        self.model, self.body = model, models.backbone(model)
        self.head, self.transform = models.head(model), models.logit_transform(model)
        self.cache = DynamicCache(config=model.config)
        names = inspect.signature(type(self.body).forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"  # transformers has renamed it
        shown = list(dict.fromkeys(i for i, _ in jobs))
        width = max(len(prompts[i]) for i in shown)
        ids = np.full((len(shown), width), pad, np.int64)
        seen = np.zeros((len(shown), width), np.int64)
        for row, i in enumerate(shown):
            ids[row, width - len(prompts[i]) :] = prompts[i]
            seen[row, width - len(prompts[i]) :] = 1
        self.seen = torch.from_numpy(seen).to(device)
        last = self._forward(torch.from_numpy(ids).to(device), (self.seen.cumsum(1) - 1).clamp(min=0))
        if len(jobs) != len(shown):
            place = {i: row for row, i in enumerate(shown)}
            rows = torch.tensor([place[i] for i, _ in jobs], device=device)
            self.cache.batch_select_indices(rows)
            self.seen, last = self.seen[rows], last[rows]
        self.last = last
        self.position = self.seen.sum(1)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Last hidden states ``[B, D]``."""
        inputs = {"input_ids": ids, "attention_mask": self.seen, "position_ids": positions, self.cache_name: self.cache}
        return self.body(**inputs, use_cache=True).last_hidden_state[:, -1]

    def logits(self) -> Tensor:
        """``[B, V]`` in float32 (float64 stays)."""
        z = self.head(self.last)
        z = z if z.dtype == torch.float64 else z.float()
        return self.transform(z) if self.transform else z

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows only (``[B]`` bool)."""
        self.cache.batch_select_indices(rows.nonzero()[:, 0])
        self.seen, self.position, self.last = self.seen[rows], self.position[rows], self.last[rows]

    def push(self, token: Tensor) -> None:
        """Append a token ``[B]`` to every row."""
        self.seen = torch.cat([self.seen, self.seen.new_ones(len(token), 1)], 1)
        self.last = self._forward(token[:, None], self.position[:, None])
        self.position = self.position + 1


class _Mixed:
    """The same of two models whose logits are mixed; each has its own cache."""

    def __init__(self, first: _Reader, mixture: Mixture, *what: Any) -> None:
        self.first, self.share, self.switched = first, mixture.share, mixture.switched
        with self.switched():
            self.second = _Reader(mixture.model, *what)

    def logits(self) -> Tensor:
        """``[B, V]``. Raises ``UsageError`` for vocabularies of different size."""
        z = self.first.logits()
        with self.switched():
            other = self.second.logits()
        if z.shape != other.shape:
            raise UsageError(f"a model with {z.shape[1]} tokens cannot be mixed with one of {other.shape[1]}")
        return torch.lerp(z, other.to(z), self.share)

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows only."""
        self.first.keep(rows)
        self.second.keep(rows)

    def push(self, token: Tensor) -> None:
        """Append a token to every row."""
        self.first.push(token)
        with self.switched():
            self.second.push(token)
