"""Any adapter of the PEFT library that acts within the layers, by the name of its configuration class."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from metier.core.adapt import Attached
from metier.core.errors import MetierError, UsageError, unknown
from metier.core.part import build, part
from metier.core.targets import Targets, linear_targets, task_type


@part("adapter/peft", paper="https://github.com/huggingface/peft")
class Peft:
    """An adapter made by PEFT: ``config`` names its class (``LoHaConfig``, ``IA3Config``), ``options`` its
    fields.

    Without ``targets`` PEFT's own choice for the architecture is used, or every linear layer in the blocks
    where it has none. Prompt-learning methods are refused: they change the sequence, not the layers.
    """

    def __init__(self, *, config: str, options: dict[str, Any] | None = None) -> None:
        self.config, self.options = config, dict(options or {})
        self.cls = _config_class(config)

    def attach(self, model: nn.Module, targets: Targets) -> Attached:
        """Put the adapter on ``model`` (in place)."""
        chosen = self._targets(model, targets)
        try:
            settings = self.cls(**{"task_type": task_type(model), **self.options, **chosen})
        except (TypeError, ValueError) as e:
            raise UsageError(f"{self.config}: {e}", where="adapter.peft.options") from e
        return PeftAttached(_wrap(model, settings), self._built())

    def _built(self) -> Any:
        return build("adapter", {"peft": {"config": self.config, "options": self.options}})

    def _targets(self, model: nn.Module, targets: Targets) -> dict[str, Any]:
        if "target_modules" in self.options:
            return {}
        if targets is not None:
            return {"target_modules": linear_targets(model, targets)}
        from peft import utils

        known = getattr(utils, f"TRANSFORMERS_MODELS_TO_{_kind(self.cls)}_TARGET_MODULES_MAPPING", {})
        covered = getattr(getattr(model, "config", None), "model_type", None) in known
        return {} if covered else {"target_modules": linear_targets(model)}

    @staticmethod
    def load(model: nn.Module, folder: Path) -> Attached:
        """Attach what PEFT saved in ``folder``."""
        from peft import PeftConfig, PeftModel

        model.requires_grad_(False)
        config = PeftConfig.from_pretrained(str(folder))
        try:
            wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=True, config=config)
        except (RuntimeError, ValueError) as e:
            raise UsageError(f"the adapter in {folder} does not fit the model: {e}") from e
        return PeftAttached(wrapped, build("adapter", {"peft": {"config": type(config).__name__}}))


def _kind(cls: Any) -> str:
    return str(cls().peft_type.value)


def _config_class(name: str) -> Any:
    import peft
    from peft import PromptLearningConfig

    every = {n: c for n, c in vars(peft).items() if n.endswith("Config") and isinstance(c, type)}
    usable = {
        n: c for n, c in every.items()
        if hasattr(c, "target_modules") and not issubclass(c, PromptLearningConfig)
    }  # fmt: skip
    if name in usable:
        return usable[name]
    if name in every and issubclass(every[name], PromptLearningConfig):
        raise UsageError(f"{name} learns a prompt, not layers", where="adapter.peft.config")
    raise unknown("configuration", name, usable, where="adapter.peft.config")


def _wrap(model: nn.Module, settings: Any) -> Any:
    import peft

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.get_peft_model(model, settings)
    except (TypeError, ValueError) as e:
        raise UsageError(f"{type(settings).__name__}: {e}", where="adapter.peft") from e


class PeftAttached(Attached):
    """The surface of :class:`Attached` on a PEFT model; ``model`` is the original one with PEFT's layers in
    it."""

    def __init__(self, wrapped: Any, built: Any) -> None:
        super().__init__(wrapped.base_model.model, built, {})
        self.peft = wrapped

    @contextlib.contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """The model as it was before the adapter, within this context."""
        with self.peft.disable_adapter():
            yield self.model

    def pairs(self) -> list[tuple[str, Tensor, Tensor]]:
        """``(target, A, B)`` of the layers that have low-rank factors."""
        layers = [(n, m) for n, m in self.model.named_modules() if "default" in (getattr(m, "lora_A", None) or {})]
        return [(n, m.lora_A["default"].weight, m.lora_B["default"].weight) for n, m in layers]  # type: ignore[index]

    def save(self, folder: str | Path) -> None:
        """Write PEFT's own files."""
        self.peft.save_pretrained(str(folder), save_embedding_layers=False)

    def merge(self) -> nn.Module:
        """PEFT's merge; raises ``UsageError`` where the method has none."""
        try:
            merged = self.peft.merge_and_unload()
        except (AttributeError, NotImplementedError, ValueError) as e:
            raise UsageError(f"{type(self.peft.active_peft_config).__name__} cannot be merged: {e}") from e
        left = [n for n, m in merged.named_modules() if type(m).__module__.startswith("peft.")]
        if left:
            raise MetierError(f"PEFT left {left[0]} in the merged model")
        return merged.requires_grad_(True)
