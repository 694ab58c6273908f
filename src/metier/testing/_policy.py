"""The model that the suite of sources lets answer: small, on the CPU, different from its reference, and it ends its answers."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch

from metier.core import models
from metier.core.batch import Pairs, Rewards
from metier.core.data.encode import Encoder
from metier.core.data.loader import Shape
from metier.core.engine import Engine
from metier.core.policy import Policy
from metier.core.scores import reference_scorer

WRITER, JUDGE = "lab/words-sft", "lab/words-120k"
"""What writes answers has to be trained: weights drawn at random hardly ever end one."""
LENGTH, BUDGET = 256, 8192
AWAY = 0.05
"""Relative noise on the reference's weights: a model that equals its reference prefers nothing."""


def writer() -> Policy:
    """A model that answers, with a reference that is not quite the same. In training mode, as a source finds it."""
    bundle = models.load(WRITER, seed=0)
    reference, noise = copy.deepcopy(bundle.model).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(AWAY * p.std() * torch.randn(p.shape, generator=noise))
    return _policy(bundle, Pairs, reference_scorer(reference, contextlib.nullcontext))


def judge() -> Policy:
    """A reward model in training, as ``objective: bradley-terry`` makes it; its weights are random."""
    return _policy(models.load(JUDGE, task="classify", num_labels=1, seed=0), Rewards, None)


def _policy(bundle: Any, reads: type, initial: Any) -> Policy:
    bundle.model.train()
    encoder = Encoder(bundle.tokenizer, max_length=LENGTH, truncate="drop", on_empty="drop")
    shape = Shape(bundle.tokenizer.pad_token_id, BUDGET, unit="example")
    return Policy(bundle, Engine(torch.device("cpu"), "fp32", "ddp"), encoder, shape, Path(), reads, initial)
