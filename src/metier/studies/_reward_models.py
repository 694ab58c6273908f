"""What studies of reward models share: a probe of a model at hand, and rewards of answers, explicit or implied."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from metier.core import part
from metier.core.batch import Pairs, Rewards
from metier.core.data.budget import token_budget
from metier.core.data.encode import Encoder
from metier.core.data.loader import Shape
from metier.core.engine import Engine
from metier.core.lossmodule import LossModule
from metier.core.models import Bundle
from metier.core.policy import Policy
from metier.core.probing import Probe
from metier.core.scores import reference_scorer

CPU = Engine(torch.device("cpu"), "fp32", "ddp")
LENGTH = 128


def probe_of(bundle: Bundle, base: Bundle | None = None) -> Probe:
    """A probe without data: of a reward model, or with ``base`` of a model tuned with that reference."""
    bundle.model.eval()
    if base is None:
        return Probe(bundle, LossModule(bundle.model, part.build("objective", "bradley-terry")), Rewards, [], CPU)
    reference = reference_scorer(base.model.eval(), nullcontext)
    return Probe(bundle, LossModule(bundle.model, part.build("objective", "dpo"), reference), Pairs, [], CPU)


def at_step(bundle: Bundle, folder: Path, step: int) -> Bundle:
    """The model of a run's folder as it was at a step that was saved; ``bundle``, its result, is changed."""
    stored = load_file(folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    missing, unexpected = bundle.model.load_state_dict(stored, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing  # a tied head is the embedding
    return bundle


def accuracies(bundle: Bundle, base: Bundle | None, files: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What probe/reward-accuracy says of every named set."""
    probe = part.build("probe", {"reward-accuracy": {"data": dict(files), "max_length": LENGTH}})
    return {row["name"]: row for row in probe.obj(probe_of(bundle, base))["sets"]}


def rewards(bundle: Bundle, base: Bundle | None, prompts: Sequence[str], answers: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """Of every answer to every prompt: what the head says, or with ``base`` the log-ratio to it, summed over tokens."""
    if base is None:
        return _policy(bundle, Rewards).rewards(prompts, answers)
    tuned, before = (_policy(b, Pairs).logps(prompts, answers) for b in (bundle, base))
    return [t - b for t, b in zip(tuned, before, strict=True)]


def _policy(bundle: Bundle, reads: type) -> Policy:
    encoder = Encoder(bundle.tokenizer, max_length=LENGTH, truncate="drop", on_empty="drop")
    shape = Shape(bundle.tokenizer.pad_token_id, token_budget(bundle.model.config, "cpu"), unit="example")
    return Policy(bundle, CPU, encoder, shape, Path(), reads)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; nan with one."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
