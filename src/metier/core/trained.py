"""A finished run read back: the model it started from and the tuned one, side by side."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metier.core import models, resolve
from metier.core.adapt import Attached, load_adapter
from metier.core.config import Run
from metier.core.context import derive_seed
from metier.core.errors import MetierError, UsageError

TASKS = {"CausalLM": "lm", "MaskedLM": "lm", "LMHeadModel": "lm", "SequenceClassification": "classify"}


@dataclass(frozen=True)
class Trained:
    """A run's result. With an adapter, base and tuned are one model; otherwise the base is loaded on first
    use."""

    folder: Path
    run: Run
    bundle: models.Bundle
    """The tuned model with its tokenizer."""
    attached: Attached | None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @cached_property
    def _original(self) -> nn.Module:
        return at_start(self.run).model.to(self.device).eval()

    @contextlib.contextmanager
    def base(self) -> Iterator[Any]:
        """The model before training, within this context."""
        if self.attached is None:
            yield self._original
        else:
            with self.attached.disabled() as model:
                yield model


def open_run(folder: str | Path, *, device: str | torch.device = "cpu") -> Trained:
    """Load the result of the run in ``folder`` for inference.

    Raises ``UsageError`` when it is no run or has no result yet, ``MetierError`` when the base model has
    changed since.
    """
    folder = Path(folder)
    record = read_record(folder)
    run = Run(**record["run"])
    if (folder / "adapter").is_dir():
        bundle, attached = _with_adapter(run, folder / "adapter", record.get("model", {}).get("fingerprint"))
    elif (folder / "model").is_dir():
        bundle, attached = load_folder(folder / "model", run), None
    else:
        raise UsageError(
            f"the run {folder} has no result yet (status: {record.get('status', 'unknown')})",
            hint="The same metier train command continues it.",
        )
    bundle.model.to(device).eval()
    return Trained(folder, run, bundle, attached, torch.device(device))


def read_record(folder: Path) -> dict[str, Any]:
    """``run.json`` of a run folder."""
    path = folder / "run.json"
    if not path.is_file():
        raise UsageError(f"{folder} is not a run folder: it has no run.json", hint="See: metier runs")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise UsageError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(record.get("run"), dict):
        raise UsageError(f"{path} does not say what was run")
    return record


def dtype_of(run: Run) -> torch.dtype:
    """Type of the run's weights."""
    return torch.bfloat16 if run.dtype == "bf16" else torch.float32


def load_folder(folder: Path, run: Run) -> models.Bundle:
    """A model folder written by a run or an export, in the run's type, without the random parts of a fresh
    load."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = config.get("architectures") or [""]
    task = next((t for end, t in TASKS.items() if names[0].endswith(end)), "lm")
    labels = len(config.get("id2label") or {}) or 2
    return models.load(str(folder), task=task, num_labels=labels, dtype=dtype_of(run))  # type: ignore[arg-type]


def load_with_adapter(run: Run, folder: Path) -> tuple[models.Bundle, Attached]:
    """The run's base model with the adapter saved in ``folder`` on it."""
    return _with_adapter(run, folder, None)


def _with_adapter(run: Run, folder: Path, fingerprint: str | None) -> tuple[models.Bundle, Attached]:
    from metier.core.adapterfile import task

    bundle = at_start(run, *task(folder))
    if fingerprint is not None and bundle.fingerprint != fingerprint:
        raise MetierError(f"the base model {run.model} is not the one that the run was trained from")
    attached = load_adapter(bundle.model, folder)
    return models.replace_model(bundle, attached.model), attached


def at_start(run: Run, task: str = "lm", labels: int = 0, device: Any = "cpu") -> models.Bundle:
    """The model as training found it, the run's transforms applied, on ``device``."""
    bundle = models.load(
        run.model, task=task, num_labels=labels or 2, dtype=dtype_of(run), seed=run.train.seed,  # type: ignore[arg-type]
    )  # fmt: skip
    bundle.model.to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run.train.seed, "init"))
        return models.transformed(bundle, [resolve.bind("model", r).built.obj for r in run.transform], run.transform)


def encode_prompt(tokenizer: Any, prompt: str) -> torch.Tensor:
    """Token ids ``[1, T]`` of a user's prompt, through the tokenizer's chat template when it has one."""
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise UsageError("the prompt is empty")
    return torch.tensor([ids])


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    decode: Sequence[Any] = (),
) -> str:
    """Generate from ``model``; greedy at temperature 0, else plain sampling seeded by ``seed``.

    ``decode`` are bound decoding parts: those with ``attach`` are entered around the generation, those with
    ``__call__(input_ids, scores)`` change the scores of every step.
    """
    from transformers import LogitsProcessorList

    if not hasattr(model, "generate") or not model.can_generate():
        raise UsageError(f"{type(model).__name__} does not generate text")
    ids = encode_prompt(tokenizer, prompt).to(model.device)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {"do_sample": False}
    )
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    with contextlib.ExitStack() as stack:
        cuda = [model.device] if model.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        torch.manual_seed(seed)
        for part in decode:
            if hasattr(part, "attach"):
                stack.enter_context(part.attach(model, tokenizer))
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, pad_token_id=pad,
            logits_processor=LogitsProcessorList([p for p in decode if callable(p)]), **sampling,
        )  # fmt: skip
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
