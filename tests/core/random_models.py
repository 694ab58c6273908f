"""What tests of sampling share: random models that are not indifferent, and random prompts."""

import numpy as np
import torch

from metier.core import models


def sharp(name="lab/llama-50k", seed=3):
    """A random model whose distributions are far from uniform."""
    bundle = models.load(name, seed=seed)
    with torch.no_grad():
        for p in bundle.model.parameters():
            p.mul_(2.5)
    bundle.model.eval()
    return bundle


def prompts(*lengths, seed=0):
    """Token ids of the lengths asked for."""
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 2000, n).astype(np.int32) for n in lengths]
