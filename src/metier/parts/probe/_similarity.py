"""How alike the two answers of a pair are."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from metier.core import models
from metier.parts.probe._pairs import Ids, Pair, grams


def tfidf_similarity(found: Sequence[Pair]) -> np.ndarray:
    """``[N]`` cosine of the two answers' counts of tokens and neighbours, weighed by ``1 + log(answers / those with it)``."""
    counts = [(grams(p.chosen), grams(p.rejected)) for p in found]
    seen = Counter(g for both in counts for c in both for g in c)
    weight = {g: 1 + np.log(2 * len(found) / n) for g, n in seen.items()}

    def cosine(a: Counter[Ids], b: Counter[Ids]) -> float:
        dot = sum(a[g] * b[g] * weight[g] ** 2 for g in a.keys() & b.keys())
        size = [sum((n * weight[g]) ** 2 for g, n in c.items()) for c in (a, b)]
        return dot / np.sqrt(size[0] * size[1]) if min(size) > 0 else 0.0

    return np.array([cosine(a, b) for a, b in counts])


def overlap(found: Sequence[Pair]) -> np.ndarray:
    """``[N]`` share of the tokens and neighbours of both answers that stand in both."""
    both = [(set(grams(p.chosen)), set(grams(p.rejected))) for p in found]
    return np.array([len(a & b) / max(1, len(a | b)) for a, b in both])


def length_ratio(found: Sequence[Pair]) -> np.ndarray:
    """``[N]`` length of the shorter answer over that of the longer one, in tokens."""
    return np.array([min(len(p.chosen), len(p.rejected)) / max(1, len(p.chosen), len(p.rejected)) for p in found])


@torch.no_grad()
def encoder_similarity(found: Sequence[Pair], tokenizer: Any, name: str = "minilm", batch: int = 64) -> np.ndarray:
    """``[N]`` cosine of the answers' embeddings by a sentence encoder: its last states averaged over the tokens."""
    bundle = models.load(name)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for p in found for ids in (p.chosen, p.rejected)]
    means = []
    for begin in range(0, len(texts), batch):
        inputs = bundle.tokenizer(
            texts[begin : begin + batch], padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        states = models.backbone(bundle.model)(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        means.append((states * mask).sum(1) / mask.sum(1))
    e = torch.nn.functional.normalize(torch.cat(means).double(), dim=1).view(len(found), 2, -1)
    return (e[:, 0] * e[:, 1]).sum(1).numpy()
