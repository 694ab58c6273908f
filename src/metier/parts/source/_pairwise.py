"""A generative model as a judge of two answers: it reads both and writes A or B (arXiv:2409.06903, section 3.1).

rows = [judged_row(x, chosen, rejected, rng), …]        -> prompt and completion, to fine-tune on with objective: lm
probabilities(model, tokenizer, [(x, a1, a2), …])        -> P(a1 is better) of each, averaged over both orders
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metier.core.errors import UsageError

LABELS = ("A", "B")


def template(prompt: str, a: str, b: str) -> str:
    """What the judge reads; its next token is the label of the better answer."""
    return f"[CONTEXT] {prompt} [RESPONSE A] {a} [RESPONSE B] {b}"


def judged_row(prompt: str, chosen: str, rejected: str, rng: np.random.Generator) -> dict[str, str]:
    """A training row ``{"prompt", "completion"}``; whether the better answer comes first is drawn anew for each row."""
    first = bool(rng.random() < 0.5)
    both = (chosen, rejected) if first else (rejected, chosen)
    return {"prompt": template(prompt, *both), "completion": LABELS[not first]}


def label_ids(tokenizer: Any) -> tuple[int, int]:
    """Token ids of the two labels. Raises ``UsageError`` when one is not a single token of its own."""
    found = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in LABELS]
    if any(len(ids) != 1 or ids[0] == tokenizer.unk_token_id for ids in found) or found[0] == found[1]:
        raise UsageError(f"the labels {' and '.join(LABELS)} are not one token each in this tokenizer")
    return found[0][0], found[1][0]


def order_averaged(first: Tensor, second: Tensor) -> Tensor:
    """``P(a1 > a2) [...]`` from the logits ``[..., 2]`` of (A, B) for the order (a1, a2) and for the order (a2, a1).

    ``½ [softmax(first)_A + softmax(second)_B]``: exchanging the answers gives one minus it, whatever the model prefers by
    place.
    """
    return (first.softmax(-1)[..., 0] + second.softmax(-1)[..., 1]) / 2


@torch.no_grad()
def probabilities(model: Any, tokenizer: Any, rows: Sequence[tuple[str, str, str]]) -> np.ndarray:
    """``P(a1 > a2)`` of every ``(prompt, a1, a2)``; float64 ``[len(rows)]``, two forward passes each."""
    labels = list(label_ids(tokenizer))

    def logits(text: str) -> Tensor:
        ids = torch.tensor([tokenizer(text)["input_ids"]], device=model.device)
        return model(input_ids=ids).logits[0, -1, labels].double().cpu()

    return np.array([float(order_averaged(logits(template(x, a, b)), logits(template(x, b, a)))) for x, a, b in rows])
