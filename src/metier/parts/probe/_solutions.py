"""Questions with solutions found in layouts: how probable the solutions are, and how the model answers by itself."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from metier.core.batch import Tokens
from metier.core.errors import UsageError
from metier.core.layout import Layout
from metier.core.probing import Probe

Reward = Callable[..., Tensor]


@dataclass(frozen=True)
class Solved:
    """A question with its solution."""

    id: str
    prompt: Tensor
    """Token ids up to the first of the solution."""
    trace: str
    layout: int
    targets: Tensor
    """Places of the solution's tokens among the layout's targets."""


def solved(probe: Probe) -> list[Solved]:
    """Every sequence of the layouts once; its last unbroken run of targets is the solution."""
    found: dict[str, Solved] = {}
    for number, layout in enumerate(probe.layouts):
        for s in range(len(layout.ids)):
            here = (layout.sequence == s).nonzero().squeeze(1)
            if len(here) and layout.ids[s] not in found:
                found[layout.ids[s]] = _solved(probe, number, layout, layout.ids[s], here)
    return list(found.values())


def _solved(probe: Probe, number: int, layout: Layout, id: str, here: Tensor) -> Solved:
    columns = layout.col[here]
    breaks = (columns.diff() != 1).nonzero().squeeze(1)
    begin = int(breaks[-1]) + 1 if len(breaks) else 0
    row, first = int(layout.row[here[0]]), int(columns[begin])
    mine = layout.group[row] == layout.group[row, first]
    mine[first + 1 :] = False
    trace = probe.bundle.tokenizer.decode(layout.target[here[begin:]], skip_special_tokens=True)
    return Solved(id, layout.input_ids[row][mine], trace, number, here[begin:])


def with_answers(found: Sequence[Solved], check: Reward) -> list[Solved]:
    """Those in whose solution ``check`` finds an answer."""

    def has(one: Solved) -> bool:
        try:
            check([""], [[one.trace]], [one.trace])
        except UsageError:
            return False
        return True

    return [one for one in found if has(one)]


def perplexities(probe: Probe, found: Sequence[Solved]) -> list[float]:
    """``exp(mean NLL)`` of each solution, given its question."""
    logps = [probe.score(x, reads=Tokens).logps.double().cpu() for x in probe.layouts]  # type: ignore[union-attr]
    return [math.exp(min(700.0, -float(logps[one.layout][one.targets.cpu()].mean()))) for one in found]


def accuracies(probe: Probe, found: Sequence[Solved], check: Reward, how: dict[str, Any], batch: int) -> list[float]:
    """Share of sampled answers that ``check`` finds right (> 0); ``how`` goes to the model's ``generate``."""
    shares = [0.0] * len(found)
    for places, texts in _sampled(probe, found, how, batch):
        truths = [found[i].trace for i in places]
        right = check([""] * len(places), texts, truths) > 0
        for i, share in zip(places, right.double().mean(1).tolist(), strict=True):
            shares[i] = share
    return shares


@torch.no_grad()
def _sampled(
    probe: Probe, found: Sequence[Solved], how: dict[str, Any], batch: int
) -> Iterator[tuple[list[int], list[list[str]]]]:
    """Batches of questions, by their places in ``found``, with sampled answers; without padding: one length a batch."""
    tokenizer, device = probe.bundle.tokenizer, probe.engine.device
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)

    def length(i: int) -> int:
        return len(found[i].prompt)

    for _, same in groupby(sorted(range(len(found)), key=length), key=length):
        places = list(same)
        for part in (places[k : k + batch] for k in range(0, len(places), batch)):
            ids = torch.stack([found[i].prompt for i in part]).to(device)
            with probe.engine.autocast():
                out = probe.model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=True, pad_token_id=pad,
                    eos_token_id=tokenizer.eos_token_id, **how,
                )  # fmt: skip
            texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            each = len(texts) // len(part)
            yield part, [texts[k * each : (k + 1) * each] for k in range(len(part))]
