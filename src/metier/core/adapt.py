"""Adapters: small trainable modules put on a frozen model.

A part of kind *adapter* is a subclass of :class:`LinearAdapter` (replaces a linear layer) or
:class:`BlockAdapter` (sits on the output of a sub-layer or block), or a class with ``attach(model, targets)
-> Attached`` when it needs the whole model. :func:`attach` freezes the model, chooses the targets and puts
the adapters in place; the resulting :class:`Attached` switches them off, saves, merges and counts them. File
formats are in ``core/adapterfile.py``.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metier.core.errors import UsageError
from metier.core.part import Built
from metier.core.targets import Targets, fresh_head, linear_targets, sublayer_targets


class _Wrapper(nn.Module):
    """What both kinds of adapter share: the frozen ``base``, the switch, and access to the base's
    attributes."""

    mergeable: ClassVar[bool] = True
    """Whether the adapter can be folded into plain weights."""
    also_trains: tuple[str, ...] = ()
    """Globs over parameter names of the model that train with the adapter (e.g. layer norms)."""
    peft_names: ClassVar[Mapping[str, str] | None] = None
    """Own parameter -> PEFT's suffix, where PEFT has this adapter; ``peft_config`` and ``from_peft`` go with
    it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.enabled = True
        self.base = base.requires_grad_(False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``forward`` when enabled, the base alone otherwise: subclasses need not know of the switch."""
        if self.enabled:
            return super().__call__(*args, **kwargs)
        return self.off(*args, **kwargs)

    def off(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the unadapted layer. Override when ``__init__`` changes ``base`` (e.g. residual
        weights)."""
        return self.base(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Attributes that model code reads from the layer it thinks it has (``layer_idx``,
        ``in_features``)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None or name.startswith("_"):
                raise
            return getattr(base, name)

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Type of new parameters: float32, or the base's type when that is wider."""
        p = next(self.base.parameters(), None)
        floating = p is not None and p.is_floating_point()
        return torch.promote_types(p.dtype, torch.float32) if p is not None and floating else torch.float32

    def trainable(self, value: Tensor) -> nn.Parameter:
        """A parameter with this start value in ``adapter_dtype``. Draw values on the CPU: one seed, any
        device."""
        return nn.Parameter(value.to(self.adapter_dtype))

    def cast(self, x: Tensor) -> Tensor:
        """``x`` in the adapter's type; under autocast the operations choose their type themselves."""
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.adapter_dtype)

    def own_state(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers of the adapter, without those of the base."""
        return {k: v for k, v in self.state_dict(keep_vars=True).items() if not k.startswith("base.")}

    def peft_config(self) -> dict[str, Any]:
        """Fields of PEFT's configuration, when ``peft_names`` is set."""
        return {}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """Options that express a PEFT configuration, or ``None`` when this part cannot express it."""
        return None


class LinearAdapter(_Wrapper):
    """An adapter in the place of a linear layer ``y = x Wᵀ + b`` with ``W [out, in]``.

    ``base`` is always an ``nn.Linear`` or has its attributes ``in_features``, ``out_features``, ``weight``,
    ``bias`` (GPT-2's transposed layers are presented that way). A subclass adds parameters in ``__init__``
    and defines ``forward(x)`` and ``merged()``.
    """

    base: nn.Linear
    calibration: int = 0
    """Steps of training data whose loss gradient :meth:`start` wants before the first step of a run; 0: none."""

    def start(self, gradient: Tensor) -> Mapping[str, Tensor]:
        """Start values by own name (of ``own_state``), given the gradient ``[out, in]`` of the mean loss at the base's
        weight. Called once, when a run starts afresh and ``calibration`` is not 0."""
        return {}

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """``(weight [out, in], bias [out] or None)`` of one plain layer that computes the same (without
        dropout)."""
        raise NotImplementedError(f"{type(self).__name__} has no merged()")

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """Low-rank factors ``(A [r, in], B [out, r])`` when the adapter has them; some optimizers treat them
        apart."""
        return None

    @property
    def weight(self) -> Tensor:
        """The effective weight, for code that reads it instead of calling the layer."""
        return self.merged()[0] if self.enabled else self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The effective bias."""
        return self.merged()[1] if self.enabled else self.base.bias


class BlockAdapter(_Wrapper):
    """An adapter on the output ``h [..., width]`` of a sub-layer or block; a subclass defines ``adapt(h) ->
    h``.

    The constructor takes ``(base, width)``, ``width`` being that of the residual stream. Such an adapter is
    not linear in general and cannot be merged.
    """

    mergeable = False

    def __init__(self, base: nn.Module, width: int) -> None:
        super().__init__(base)
        self.width = width

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's output with its first tensor adapted."""
        out = self.base(*args, **kwargs)
        if isinstance(out, tuple):
            return (self.adapt(out[0]), *out[1:])
        return self.adapt(out)

    def adapt(self, h: Tensor) -> Tensor:
        """The adapted hidden states, same shape and type as ``h [..., width]``."""
        raise NotImplementedError(f"{type(self).__name__} has no adapt()")


class Attached:
    """A model with its adapters in place."""

    def __init__(
        self,
        model: nn.Module,
        built: Built,
        adapters: Mapping[str, Any],
        extra: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.built = model, built
        self.adapters: dict[str, Any] = dict(adapters)
        """Target's module name -> adapter module."""
        self.extra: dict[str, Tensor] = dict(extra or {})
        """Parameters of the model itself that train too -> their value before training."""

    @property
    def count(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def pairs(self) -> list[tuple[str, Tensor, Tensor]]:
        """``(target, A [r, in], B [out, r])`` of every adapter that has low-rank factors."""
        found = ((n, a.pair()) for n, a in self.adapters.items() if isinstance(a, LinearAdapter))
        return [(name, *pair) for name, pair in found if pair is not None]

    @contextlib.contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """The model as it was before the adapter, within this context."""
        before = {n: a.enabled for n, a in self.adapters.items()}
        for adapter in self.adapters.values():
            adapter.enabled = False
        trained = self._swap(self.extra)
        try:
            yield self.model
        finally:
            self._swap(trained)
            for name, adapter in self.adapters.items():
                adapter.enabled = before[name]

    def _swap(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put ``values`` in place; returns what was there. Autograd's version counters are left alone on
        purpose."""
        held = {}
        for name, value in values.items():
            p = self.model.get_parameter(name)
            held[name], p.data = p.data, value.to(p.device)
        return held

    def save(self, folder: str | Path) -> None:
        """Write the adapter to ``folder``: PEFT's format where it can be expressed, else
        ``metier-adapter``."""
        from metier.core import adapterfile

        adapterfile.save(self, Path(folder))

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Fold the adapters into plain layers, in place, in the weights' own type. The adapters are gone
        afterwards.

        Raises ``UsageError`` when the adapter cannot be merged.
        """
        if not all(a.mergeable for a in self.adapters.values()):
            raise UsageError(
                f"{self.built.id} cannot be merged: it is not linear in the layer's input",
                hint="Export the adapter itself, or use an adapter that can be merged.",
            )
        for name, adapter in self.adapters.items():
            self.model.set_submodule(name, _plain(adapter))
        self.adapters, self.extra = {}, {}
        return self.model.requires_grad_(True)


def _plain(adapter: Any) -> nn.Module:
    """A plain layer, of the class that was replaced, holding the merged weights."""
    weight, bias = adapter.merged()
    original = adapter.base
    transposed = getattr(original, "transposed_from", None)
    dtype = original.weight.dtype if original.weight.is_floating_point() else weight.dtype
    if transposed is not None:
        layer = transposed(original.out_features, original.in_features)
        weight = weight.T
        bias = torch.zeros(original.out_features, device=weight.device) if bias is None else bias
    else:
        layer = nn.Linear(original.in_features, original.out_features, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.to(dtype).contiguous())
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.to(dtype).contiguous()))
    return layer.train(adapter.training)


def as_linear(layer: nn.Module) -> nn.Module:
    """``layer`` itself, or an ``nn.Linear`` on the same memory for transformers' ``Conv1D`` (weight ``[in,
    out]``)."""
    if type(layer).__name__ != "Conv1D":
        return layer
    inputs, outputs = layer.weight.shape  # type: ignore[misc]
    linear = nn.Linear(int(inputs), int(outputs), device="meta")
    linear.weight = nn.Parameter(layer.weight.data.T, requires_grad=False)  # type: ignore[union-attr]
    linear.bias = layer.bias  # type: ignore[assignment]
    linear.transposed_from = type(layer)  # type: ignore[assignment]
    return linear.train(layer.training)


def attach(model: nn.Module, built: Built, *, targets: Targets = None) -> Attached:
    """Freeze ``model`` and put the adapter ``built`` on its targets.

    ``targets``: module-name globs, each of which must match (``q_proj``, ``model.layers.0.*``), or
    ``all-linear`` (every linear layer in the blocks, the default), ``attention``, ``mlp``; a list may mix
    them. Block adapters take ``sublayers`` (their default), ``attention``, ``mlp``, ``blocks`` or globs. The
    classification head of a sequence classifier is trained whole, since it starts at random. Start values
    come from torch's global generator.

    Raises ``UsageError`` when a glob matches nothing, a target's weights are tied, or the model has adapters
    already.
    """
    if any(isinstance(m, _Wrapper) for m in model.modules()):
        raise UsageError("the model has an adapter already", hint="Merge it first.")
    model.requires_grad_(False)
    whole = getattr(built.obj, "attach", None)
    if whole is not None:
        return whole(model, targets)
    cls = getattr(built.obj, "func", built.obj)
    if not (inspect.isclass(cls) and issubclass(cls, LinearAdapter | BlockAdapter)):
        raise UsageError(f"{built.id} is neither a LinearAdapter nor a BlockAdapter and has no attach()")
    return _put(model, built, _choose(model, cls, targets))


def _choose(model: nn.Module, cls: type, targets: Targets) -> list[str]:
    names = linear_targets(model, targets) if issubclass(cls, LinearAdapter) else sublayer_targets(model, targets)
    if issubclass(cls, LinearAdapter):
        _refuse_tied(model, names)
    return names


def _refuse_tied(model: nn.Module, names: list[str]) -> None:
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(name)
    for name in names:
        shared = owners.get(id(getattr(model.get_submodule(name), "weight", None)), [])
        if len(shared) > 1:
            raise UsageError(
                f"the weight of {name} is tied to {next(s for s in shared if s != f'{name}.weight')}",
                where="adapter.targets",
                hint="An adapter on it could not be merged; leave it out of the targets.",
            )


def _put(model: nn.Module, built: Built, names: list[str]) -> Attached:
    adapters: dict[str, Any] = {}
    cls = getattr(built.obj, "func", built.obj)
    for name in names:
        layer = model.get_submodule(name)
        device = next((p.device for p in layer.parameters()), torch.device("cpu"))
        linear = issubclass(cls, LinearAdapter)
        adapter = built.obj(as_linear(layer)) if linear else built.obj(layer, model.config.hidden_size)  # type: ignore[union-attr]
        adapters[name] = adapter.to(device).train(layer.training)
        model.set_submodule(name, adapters[name])
    return Attached(model, built, adapters, _unfreeze(model, adapters))


def _unfreeze(model: nn.Module, adapters: Mapping[str, Any]) -> dict[str, Tensor]:
    """Make the model's own parameters trainable that go with the adapter; returns copies of them."""
    globs = {g for a in adapters.values() for g in a.also_trains}
    own = {id(p) for a in adapters.values() for n, p in a.named_parameters() if not n.startswith("base.")}
    head = set(fresh_head(model))
    extra = {}
    for name, p in model.named_parameters():
        if id(p) not in own and (name in head or any(fnmatchcase(name, g) for g in globs)):
            extra[name] = p.requires_grad_(True).detach().clone()
    return extra


def load_adapter(model: nn.Module, folder: str | Path) -> Attached:
    """Attach the adapter saved in ``folder`` (PEFT's or metier's format) to ``model``, weights included.

    Raises ``UsageError`` when the folder holds no adapter, or one that does not fit the model.
    """
    from metier.core import adapterfile

    return adapterfile.load(model, Path(folder))
