"""bf16: by autocast or as the type of the weights, training stays close to fp32, and what is saved has the right type."""

import pytest
import torch
from safetensors.torch import load_file

from metier import train

RUN = {
    "model": "lab/llama-50k",
    "data": {"train": "lab/pydoc", "limit": 12, "chunk": True, "max_length": 32},
    "optimizer": {"adamw": {"lr": 3e-3}},
    "schedule": "constant",
}
STEPS = {"steps": 5, "batch": 8}


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    return train({**RUN, "train": STEPS}, out=tmp_path_factory.mktemp("fp32"), quiet=True)


def losses(result):
    return [e["loss"] for e in result.events if e["event"] == "step"]


def weights(result):
    return load_file(result.folder / "model" / "model.safetensors")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast(tmp_path, fp32, checkpointing):
    settings = {**STEPS, "precision": "bf16", "gradient_checkpointing": checkpointing}
    result = train({**RUN, "train": settings}, out=tmp_path, quiet=True)
    assert losses(result) == pytest.approx(losses(fp32), abs=5e-3)
    assert losses(result) != losses(fp32)
    assert {t.dtype for t in weights(result).values()} == {torch.float32}


def test_weights_in_bf16(tmp_path, fp32):
    result = train({**RUN, "dtype": "bf16", "train": STEPS}, out=tmp_path, quiet=True)
    assert losses(result) == pytest.approx(losses(fp32), abs=2e-2)
    assert {t.dtype for t in weights(result).values()} == {torch.bfloat16}
