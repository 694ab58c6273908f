"""The ``torch.optim.Optimizer`` that moves parameters by a rule; see ``core/optim.py``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from metier.core import gradients, shards, stacking
from metier.core.errors import MetierError, UsageError, unknown
from metier.core.step import Step

if TYPE_CHECKING:
    from metier.core.optim import Rule, State

GROUP_KEYS = ("params", "lr", "weight_decay", "initial_lr", "role", "name", "param_names")
TABLES = ("embed", "wte", "wpe", "lm_head")
"""What the names of embeddings and output layers contain."""
Sampler = Callable[[], tuple[int, Mapping[int, Tensor]]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class _Slot:
    """One parameter opened for a step: plain tensors of the dtype in which the rule computes."""

    p: Tensor
    stored: dict[str, Any]
    whole: bool
    value: Tensor
    grad: Tensor
    state: State
    t: int
    opened: dict[str, Tensor] = field(default_factory=dict)


class Optimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` that moves parameters by a :class:`Rule`.

    ``params``: tensors, ``(name, tensor)`` pairs or group dicts with their own ``lr`` and ``weight_decay``.
    A group may name the ``role`` of its parameters (:data:`metier.core.groups.ROLES`), which decides by which
    rule they are moved (:meth:`Rule.for_role`); :func:`metier.core.optim.build` finds all roles of a model.
    Without it the number of dimensions decides: a mixed group is split when the rule treats roles
    differently, with ``lr`` times the ratio of the rules' default learning rates.

    ``state_dtype``: how state shaped like its parameter is stored. ``None``: as the arithmetic, float32 or
    wider. ``"bf16"``: halved, with stochastic rounding that is a function of step and parameter, hence equal
    on all replicas.

    ``check_finite``: look for gradients that are not finite before anything is changed (one pass over them);
    training loops that have looked already switch it off. ``sampler``: called on the steps on which the rule
    wants gradients on sampled labels; gives their number and the gradients by ``id`` of the parameter.

    Raises ``UsageError`` for integer or complex parameters, unknown group keys, embeddings without a role
    under a matrix method, and sparse gradients; ``MetierError`` for gradients that are not finite. All name
    the parameter.
    """

    def __init__(
        self, params: Iterable, rule: Rule, *, lr: float | Tensor, weight_decay: float = 0.0,
        state_dtype: torch.dtype | Literal["fp32", "bf16"] | None = None, check_finite: bool = True,
    ) -> None:  # fmt: skip
        if not float(lr) > 0:
            raise UsageError(f"lr = {lr}: must be above 0")
        if not weight_decay >= 0:
            raise UsageError(f"weight_decay = {weight_decay}: must be at least 0")
        self.rule = rule
        self.state_dtype = DTYPES[state_dtype] if isinstance(state_dtype, str) else state_dtype
        self.check_finite = check_finite
        self.sampler: Sampler | None = None
        self.loss: float | None = None
        self.progress: float | None = None
        self._rules: dict[str, Rule] = {}
        self._noise: dict[torch.device, torch.Generator] = {}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def __getstate__(self) -> dict[str, Any]:
        kept = {n: getattr(self, n) for n in ("rule", "state_dtype", "check_finite", "loss", "progress")}
        return {**super().__getstate__(), **kept, "_rules": {}, "_noise": {}, "sampler": None}

    # --- groups ---------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; see the class."""
        for key in param_group:
            if key not in GROUP_KEYS:
                raise unknown("key of a parameter group", key, GROUP_KEYS)
        given = param_group["params"]
        items = [given] if isinstance(given, Tensor) else given if isinstance(given, set) else list(given)
        for i, item in enumerate(items):
            name, p = item if isinstance(item, tuple) else (f"parameter {i} of the group", item)
            _check_parameter(str(name), p)
        role = param_group.get("role")
        if role is not None:
            return self._add({**param_group, "params": items}, role)
        for items_of_rule, guess in self._by_rule(list(items)):
            scaled = param_group.get("lr", self.defaults["lr"]) * (self.rule_of(guess).default_lr / self.rule.default_lr)
            self._add({**param_group, "params": items_of_rule, "lr": scaled}, guess, guessed=True)
        return None

    def _by_rule(self, items: list[Any]) -> list[tuple[list[Any], str]]:
        """``items`` in one list for each rule that their dimensions ask for, with a role of that rule."""
        lists: dict[int, tuple[list[Any], str]] = {}
        for role in ("matrices", "tensors", "rest"):
            same = [i for i in items if _plain_role(_tensor(i)) == role]
            if same:
                lists.setdefault(id(self.rule_of(role)), ([], role))[0].extend(same)
        if len(lists) == 1:
            return [(items, next(iter(lists.values()))[1])]
        return list(lists.values())

    def _add(self, group: dict[str, Any], role: str, *, guessed: bool = False) -> None:
        if role == "matrices" and self.rule.matrices:
            _check_matrices(group["params"], self.rule, guessed)
        super().add_param_group({**group, "role": role})
        self.param_groups[-1].setdefault("initial_lr", float(self.param_groups[-1]["lr"]))

    def rule_of(self, role: str) -> Rule:
        """The rule that moves the parameters of a role; one object for equal rules."""
        if role not in self._rules:
            rule = self.rule.for_role(role)
            self._rules[role] = next((r for r in self._rules.values() if r == rule), rule)
        return self._rules[role]

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter with its name, or its index as text when it was given without one."""
        index = 0
        for group in self.param_groups:
            names = group.get("param_names") or [str(index + i) for i in range(len(group["params"]))]
            yield from zip(names, group["params"], strict=True)
            index += len(group["params"])

    # --- the step -------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[..., Any] | None = None) -> Any:  # type: ignore[override]
        """One update. ``closure`` evaluates the loss; rules that need one call it as often as they like.

        Returns the loss of the closure, or ``None``.
        """
        if hasattr(self.rule, "step"):
            return self._closure_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.check_finite:
            gradients.refuse_nonfinite(self.named())
        order = {id(p): i for i, (_, p) in enumerate(self.named())}
        drawn = self._drawn()
        for group in self.param_groups:
            rule = self.rule_of(group["role"])
            ready = [p for p in group["params"] if p.grad is not None]
            keyed = stacking.buckets(ready, lambda p: (self._steps(p), p.device, p.dtype), lambda p: p.numel())
            for portion in keyed:
                slots = [self._open(p, rule) for p in portion]
                busy = [s for s in slots if s.value.numel()]
                if busy:
                    step = self._step(group, rule, busy, drawn)
                    rule.apply([s.value for s in busy], [s.grad for s in busy], [s.state for s in busy], step)
                for slot in busy:
                    self._close(slot, order[id(slot.p)])
        return loss

    def observe(self, *, loss: float | None, progress: float | None) -> None:
        """Tell rules the loss and the progress of the step that comes next."""
        self.loss, self.progress = loss, progress

    def _step(self, group: dict[str, Any], rule: Rule, slots: list[_Slot], drawn: Any) -> Step:
        names = group.get("param_names")
        known = dict(zip(map(id, group["params"]), names, strict=True)) if names else {}
        sampled = None
        if drawn is not None and _wants_samples(rule, slots[0].t):
            sampled = tuple(self._sampled(s, drawn[1]) for s in slots)
        return Step(
            t=slots[0].t, lr=float(group["lr"]), weight_decay=float(group["weight_decay"]),
            peak=float(group["initial_lr"]), names=tuple(known.get(id(s.p), "") for s in slots),
            loss=self.loss, progress=self.progress, sampled=sampled, samples=drawn[0] if drawn else 0,
        )  # fmt: skip

    def _drawn(self) -> tuple[int, Mapping[int, Tensor]] | None:
        """Gradients on sampled labels, when some parameter's rule wants them at this step."""
        wanted = any(
            _wants_samples(self.rule_of(group["role"]), self._steps(p) + 1)
            for group in self.param_groups for p in group["params"] if p.grad is not None
        )  # fmt: skip
        if not wanted:
            return None
        if self.sampler is None:
            raise UsageError(
                f"{type(self.rule).__name__} needs gradients on labels sampled from the model",
                hint="Train with metier, or set optimizer.sampler to a function that computes them.",
            )
        with torch.enable_grad():
            return self.sampler()

    @staticmethod
    def _sampled(slot: _Slot, drawn: Mapping[int, Tensor]) -> Tensor | None:
        g = drawn.get(id(slot.p))
        return None if g is None else shards.opened(shards.gradient_like(slot.p, g), whole=slot.whole).to(slot.value.dtype)

    def _steps(self, p: Tensor) -> int:
        return int(self.state[p].get("step", 0)) if p in self.state else 0

    def _open(self, p: Tensor, rule: Rule) -> _Slot:
        grad = p.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise UsageError(
                f"the gradient of {gradients.called(next(n for n, q in self.named() if q is p))} is sparse",
                hint="Use nn.Embedding(…, sparse=False).",
            )
        whole = shards.is_sharded(p) and not rule.elementwise
        compute = _compute_dtype(p)
        value = shards.opened(p, whole=whole).to(compute)
        stored = self._stored(p, rule, value, whole)
        stored["step"] = int(stored["step"]) + 1
        opened = {k: shards.opened(v, whole=whole) for k, v in stored.items() if k != "step"}
        state = {k: v.to(compute) if self._compact(v, value) else v for k, v in opened.items()}
        grad = shards.opened(shards.gradient_like(p, grad), whole=whole).to(compute)
        return _Slot(p, stored, whole, value, grad, state, stored["step"], opened)

    def _stored(self, p: Tensor, rule: Rule, value: Tensor, whole: bool) -> dict[str, Any]:
        """The parameter's state, made by the rule at its first step."""
        stored = self.state[p]
        if "step" not in stored:
            for key, tensor in rule.init(value).items():
                if self._compact(tensor, value):
                    tensor = tensor.to(self.state_dtype or tensor.dtype)
                    tensor = shards.split_like(p, tensor) if whole else shards.pieces_like(p, tensor)
                stored[key] = tensor
            stored["step"] = 0
        return stored

    @staticmethod
    def _compact(tensor: Tensor, value: Tensor) -> bool:
        """Whether a state tensor is shaped like the parameter: stored in ``state_dtype``, split like it."""
        return tensor.is_floating_point() and tensor.shape == value.shape

    def _close(self, slot: _Slot, index: int) -> None:
        if slot.whole or slot.value.dtype != slot.p.dtype:
            shards.write(slot.p, slot.value, whole=slot.whole)
        for n, (key, value) in enumerate(slot.state.items()):
            target = slot.stored[key]
            if value is not slot.opened[key] or (slot.whole and shards.is_sharded(target)):
                shards.write(target, value, whole=slot.whole, noise=self._dither(value.device, slot.t, index, n))

    def _dither(self, device: torch.device, *where: int) -> torch.Generator | None:
        if self.state_dtype != torch.bfloat16:
            return None
        generator = self._noise.setdefault(device, torch.Generator(device))
        step, index, n = where
        return generator.manual_seed((step * 1_000_003 + index * 31 + n) % 2**63)

    def _closure_step(self, closure: Callable[..., Any] | None) -> Any:
        """Hand everything to a rule that evaluates the loss itself, all groups in one call.

        The rule's ``step(closure, params, states, *, lr, weight_decay, t)`` gets lists of equal length:
        trainable parameters, their states, and each one's learning rate and weight decay.
        ``closure(backward=False)`` gives the loss as a number; with ``backward=True`` it leaves fresh
        gradients in ``p.grad``. It returns the loss to report.
        """
        if closure is None:
            raise UsageError(f"{type(self.rule).__name__} evaluates the loss itself: call step(closure)")
        rows = [(p, g) for g in self.param_groups for p in g["params"] if p.requires_grad]
        params = [p for p, _ in rows]
        states = [self._stored(p, self.rule, p, False) for p in params]
        t = 1 + max((int(s["step"]) for s in states), default=0)
        loss = self.rule.step(  # type: ignore[attr-defined]
            _two_way(closure, params), params, states, t=t,
            lr=[float(g["lr"]) for _, g in rows], weight_decay=[float(g["weight_decay"]) for _, g in rows],
        )  # fmt: skip
        for state in states:  # a step that raised has not been made
            state["step"] = t
        return loss

    # --- state ----------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, except that state keeps its own dtype instead of taking the parameter's."""
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                self.state[p][key] = value.detach().to(p.device, copy=True) if isinstance(value, Tensor) else value

    def local(self) -> list[Tensor]:
        """Parameters whose gradients must not be averaged over processes: their rule does that itself."""
        return [p for g in self.param_groups if self.rule_of(g["role"]).local_gradients for p in g["params"]]

    def full_state_dict(self) -> dict[str, dict[str, Any]]:
        """``{parameter name: {"step": t, key: whole CPU tensor}}``. Every process must call it."""
        for p in self.local():
            if p in self.state:
                self.rule.settle([self.state[p]])  # type: ignore[attr-defined]
        return {
            name: {k: _to_cpu(v) if isinstance(v, Tensor) else v for k, v in self.state[p].items()}
            for name, p in self.named() if p in self.state
        }  # fmt: skip

    def load_full_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Load what :meth:`full_state_dict` gave, at any world size; parameters it does not name start
        afresh.
        """
        known = dict(self.named())
        for name in state:
            if str(name) not in known:
                raise MetierError(f"the optimizer state holds {name!r}, which is not a parameter of this optimizer")
        self.drop_state(known.values())
        for name, values in state.items():
            p = known[str(name)]
            for key, value in values.items():
                self.state[p][key] = _from_cpu(value, p) if isinstance(value, Tensor) else value

    def state_bytes(self) -> int:
        """Bytes of optimizer state that this process holds."""
        return sum(shards.local_bytes(v) for s in self.state.values() for v in s.values() if isinstance(v, Tensor))

    def drop_state(self, params: Iterable[Tensor]) -> None:
        """Forget the state of ``params``: their next step is their first."""
        for p in params:
            self.state.pop(p, None)


def _tensor(item: Any) -> Any:
    return item[1] if isinstance(item, tuple) else item


def _plain_role(p: Tensor) -> str:
    return "matrices" if p.ndim == 2 else "rest" if p.ndim < 2 else "tensors"


def _wants_samples(rule: Rule, t: int) -> bool:
    return rule.sample_every > 0 and (t - 1) % rule.sample_every == 0


def _check_matrices(items: list[Any], rule: Rule, guessed: bool) -> None:
    """Refuse what a matrix method must not move."""
    for i, item in enumerate(items):
        name, p = item if isinstance(item, tuple) else (f"parameter {i} of the group", item)
        if p.ndim != 2:
            raise UsageError(f"{name} has shape {list(p.shape)}; {type(rule).__name__} moves matrices only")
        if guessed and any(word in name for word in TABLES):
            raise UsageError(
                f"{name} looks like an embedding or an output layer; {type(rule).__name__} moves hidden matrices only",
                hint="Give its group role='embeddings' or 'head' (or 'matrices' to insist), or use build(model, …).",
            )


def _check_parameter(name: str, p: Any) -> None:
    if isinstance(p, Tensor) and not p.is_floating_point():
        raise UsageError(f"{name} is {p.dtype}: only real floating-point tensors can be optimized")


def _compute_dtype(p: Tensor) -> torch.dtype:
    return p.dtype if p.dtype == torch.float64 else torch.float32


def _to_cpu(value: Tensor) -> Tensor:
    return shards.opened(value.detach(), whole=True).to("cpu", copy=True)


def _from_cpu(value: Tensor, p: Tensor) -> Tensor:
    moved = value.to(p.device, copy=True)
    return shards.split_like(p, moved) if value.is_floating_point() and value.shape == p.shape else moved


def _two_way(closure: Callable[..., Any], params: list[Tensor]) -> Callable[..., float]:
    """``closure(backward=False) -> float`` from such a closure, or from one in torch's form that always goes
    backward.
    """
    accepts = "backward" in inspect.signature(closure).parameters

    def evaluate(backward: bool = False) -> float:
        if backward or not accepts:
            for p in params:
                p.grad = None
        with torch.set_grad_enabled(backward or not accepts):
            value = closure(backward=backward) if accepts else closure()
        if not backward and not accepts:
            for p in params:
                p.grad = None
        return value.item() if isinstance(value, Tensor) else float(value)

    return evaluate
