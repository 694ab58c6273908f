"""Tokenizer and fine-tuned model of the word language (``metier.lab.words``): ``lab/words-sft``.

The weights are trained when first wanted, in about half a minute on one core, and then read from metier's cache. They are
a function of the code and the seed; across machines they agree up to the rounding of their arithmetic.
"""

import hashlib
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

from metier.lab import wordpairs, words, zoo

MODEL = "lab/words-120k"
VERSION = 1
"""Of the training below: raise it with any change that changes the weights."""
ROWS, STEPS, BATCH, RATE = 16000, 850, 64, 5e-3
FIRST, FIRST_FOLLOW = 0.6, 0.95
"""In this share of the steps control words are followed nearly always: what they mean is too faint to learn at 60 %."""


@cache
def word_tokenizer() -> Any:
    """One token a word, split at blanks; ends with ``<end>``, pads with ``<pad>``, no chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {w: i for i, w in enumerate(words.vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def trained(seed: int = 0, steps: int = STEPS) -> Path:
    """The safetensors file of the model after ``steps`` steps on the mixture; other seeds and lengths give other checkpoints."""
    from filelock import FileLock

    from metier.core.cache import cache_folder

    size = zoo.SIZES[MODEL.removeprefix("lab/")]
    data = [words.vocabulary(), *(wordpairs.mixture(500, seed, follow=f) for f in (FIRST_FOLLOW, words.FOLLOWED))]
    identity = json.dumps([VERSION, size, data, ROWS, BATCH, RATE, FIRST, seed, steps])
    path = cache_folder() / "lab" / f"words-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                _train(seed, steps, path)
    return path


def _train(seed: int, steps: int, path: Path) -> None:
    from safetensors.torch import save_file

    aside = path.with_suffix(".tmp")
    save_file({n: p.detach() for n, p in fine_tuned(seed, steps).named_parameters()}, aside)  # the tied head is the embedding
    aside.replace(path)


def fine_tuned(seed: int, steps: int) -> Any:
    """A model trained from random weights on ``wordpairs.mixture``: AdamW, half-cosine decay, loss on the answers only."""
    import torch
    from torch.nn import functional as F

    from metier.core import models

    model = models.load(MODEL, seed=seed).model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    first, then = (_encoded(wordpairs.mixture(ROWS, seed, follow=f)) for f in (FIRST_FOLLOW, words.FOLLOWED))
    order = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        ids, answers = first if step < FIRST * steps else then
        rows = torch.randint(len(ids), (BATCH,), generator=order)
        width = int(answers[rows].any(0).nonzero().max()) + 1
        x, wanted = ids[rows, :width], answers[rows, 1:width]
        h = models.backbone(model)(input_ids=x[:, :-1]).last_hidden_state[wanted]
        F.cross_entropy(models.head(model)(h), x[:, 1:][wanted]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _encoded(rows: list[dict[str, str]]) -> tuple[Any, Any]:
    """Token ids ``[N, T]``, padded on the right, and which of them belong to answers."""
    import torch

    number = {w: i for i, w in enumerate(words.vocabulary())}
    end, pad = number["<end>"], number["<pad>"]
    texts = [([number[w] for w in r["prompt"].split()], [number[w] for w in r["completion"].split()] + [end]) for r in rows]
    width = max(len(p) + len(a) for p, a in texts)
    ids = torch.tensor([[*p, *a, *[pad] * (width - len(p) - len(a))] for p, a in texts])
    begins, ends = (torch.tensor(v)[:, None] for v in ([len(p) for p, _ in texts], [len(p) + len(a) for p, a in texts]))
    place = torch.arange(width)
    return ids, (place >= begins) & (place < ends)
