"""Learned layer-wise learning rates (Kristiansen et al. 2024): a small network sets each tensor's step and its direction."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from metier.core import part as parts
from metier.core.errors import UsageError
from metier.core.optim import Rule, State, Step
from metier.core.part import Beta, Claim, Count, Positive, part
from metier.parts.optimizer import _l3rs_controller as controllers


@part(
    "optimizer/l3rs",
    paper="arXiv:2408.09310",
    rows=(2,),
    claim=Claim(
        text="a controller meta-trained on similar runs ends below a tuned Adam at equal steps",
        metric="eval_loss",
        against="optimizer/adamw",
        figure="ResNet-34 fine-tuned on ImageNet: about 2x fewer steps than the best tuned optimizer to a given accuracy",
    ),
)
@dataclass(frozen=True, kw_only=True)
class L3RS(Rule):
    """Normalised directions of several optimizers, mixed and scaled for every tensor at every step by a learned network.

    Each base rule p sees the same gradient, keeps its own state and gives its direction ``d_p`` (rate 1, no decay);
    ``d̂_p = d_p / (‖d_p‖ + ε)``. A network with one hidden layer, shared by all tensors, maps a tensor's features to a
    scalar s and logits z: ``μ = softmax(z)``, update ``θ ← θ - λ Σ_p μ_p d̂_p`` with ``λ = lr · exp(s)``. ``lr`` is the
    length of a tensor's step, whatever its size (less where the bases disagree); Adam at rate a goes about ``a √entries``.

    Features: loss, ``log ‖g‖``, ``log ‖θ‖`` and every ``log ‖d_p‖``, each as running averages ``a_i ← γ_i a_i + (1-γ_i) ξ``
    (divided by ``1-γ_iᵏ``, as they start at 0) and their differences ``a_i - a_j``; the fraction of the run done;
    ``tanh(k/τ)`` for τ = 10, 100, 1000; an embedding learned for this parameter *name*. A name that the controller has not
    seen has the embedding zero: it runs, as an unknown layer. Without a loss or a progress told by the loop these features
    are 0. Clipping by the global norm changes the features.

    ``controller``: safetensors file from ``metier meta``; without one s = 0 and μ is uniform, which is also what a new
    controller says. The file is read when the rule is built, never again in a run. ``bases``: optimizer parts, with options
    as ``{adamw: {beta2: 0.99}}``, that give a direction of each tensor by its gradient (no matrix or closure methods).
    ``gammas``: constants of the averages. Both must be those of the file. ``relative``: λ times ``‖θ‖`` (times 1 for an
    all-zero tensor, which could not move otherwise). ``embed_dim``, ``hidden``: sizes of a *new* controller.

    The schedule multiplies lr, so a controller learned under one schedule expects that one; weight decay uses lr, not λ.
    State: that of the bases (three tensors like the parameter for the default) and [1, 3 + P, G] averages. Cost: every base's
    update, a norm of each direction, gradient and weight, a pass per base for the mix: 5 times fused AdamW's step on a Llama
    of 6 M parameters, of which the network is nothing. Use it where one pretrained model is fine-tuned many times on similar
    data: learning takes hundreds of runs, and embeddings tie it to the architecture.

    No code was published. Controller sizes, constants, ``|s| ≤ 10`` and Adam and SGD with momentum as defaults are ours.
    """

    default_lr = 0.02
    learns: ClassVar[str] = "controller"
    """Option that takes the learned file (:mod:`metier.core.metatrain`)."""

    controller: str | None = None
    bases: tuple[str | dict[str, dict[str, Any] | None], ...] = ("adamw", "sgd-momentum")
    relative: bool = False
    gammas: tuple[Beta, ...] = (0.5, 0.9, 0.99)
    eps: Positive = 1e-12
    embed_dim: Count = 4
    hidden: Count = 8

    _rules: tuple[Rule, ...] = field(init=False, repr=False, compare=False)
    _controller: controllers.Controller | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Build the base rules and read the controller."""
        if not self.bases or not self.gammas:
            raise UsageError("at least one is needed", where=f"optimizer.l3rs.{'gammas' if self.bases else 'bases'}")
        rules = tuple(_base(ref) for ref in self.bases)
        made = None if self.controller is None else controllers.load(self.controller, bases=self.bases, gammas=self.gammas)
        object.__setattr__(self, "_rules", rules)
        object.__setattr__(self, "_controller", made)

    def blank(self, names: Sequence[str], seed: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and header of a new controller file for parameters of these names."""
        return controllers.blank(names, self.bases, self.gammas, embed=self.embed_dim, hidden=self.hidden, seed=seed)

    def init(self, p: Tensor) -> State:
        """State of every base under its index, and the averages at zero."""
        state = {f"{i}.{key}": v for i, rule in enumerate(self._rules) for key, v in rule.init(p).items()}
        return {**state, "averages": p.new_zeros(1, 3 + len(self._rules), len(self.gammas))}

    def update(self, g: Tensor, p: Tensor, state: State, step: Step) -> Tensor:
        """``exp(s) Σ_p μ_p d̂_p``."""
        found, weights = self._directions([g], [p], [state], step)
        return torch.stack([d[0] * w for d, w in zip(found, weights[0].unbind(), strict=True)]).sum(0)

    def apply(self, params: list[Tensor], grads: list[Tensor], states: list[State], step: Step) -> None:
        """The controller once for the whole list; the mix is added to the weights without a copy."""
        found, weights = self._directions(grads, params, states, step)
        if step.weight_decay:
            torch._foreach_mul_(params, 1 - step.lr * step.weight_decay)
        for directions, column in zip(found, (weights * -step.lr).unbind(1), strict=True):
            for p, d, w in zip(params, directions, column.unbind(), strict=True):
                p.addcmul_(d, w)

    def _directions(self, grads: list, params: list, states: list[State], step: Step) -> tuple[list[list[Tensor]], Tensor]:
        """Directions per base and tensor, and their weights ``exp(s) μ_p / (‖d_p‖ + ε)`` [L, P]."""
        found = [self._base_directions(i, grads, params, states, step) for i in range(len(self._rules))]
        norms = [torch.stack(torch._foreach_norm(x)) for x in (grads, params, *found)]
        weights = self._mix(norms, states, step) / (torch.stack(norms[2:], dim=1) + self.eps)
        if self.relative:
            weights = weights * torch.where(norms[1] > 0, norms[1], 1.0).unsqueeze(1)
        return found, weights

    def _base_directions(self, i: int, grads: list, params: list, states: list[State], step: Step) -> list[Tensor]:
        """Directions of base ``i`` at rate 1, which changes its part of the states in place."""
        out = []
        for row, (g, p, state) in enumerate(zip(grads, params, states, strict=True)):
            own = {key.partition(".")[2]: v for key, v in state.items() if key.startswith(f"{i}.")}
            d = self._rules[i].update(g, p, own, replace(step.only([row]), lr=1.0, peak=1.0, weight_decay=0.0))
            out.append(torch.zeros_like(p) if d is None else d)
        return out

    def _mix(self, norms: list[Tensor], states: list[State], step: Step) -> Tensor:
        """``exp(s) μ`` [L, P]; keeps the averages."""
        kept = [s["averages"] for s in states]
        logs = torch.stack(norms, dim=1).clamp(min=1e-10).log()
        loss = torch.full_like(logs[:, :1], 0.0 if step.loss is None else step.loss)
        rates = logs.new_tensor(self.gammas)
        now = torch.cat(kept).lerp(torch.cat([loss, logs], dim=1).unsqueeze(-1), 1 - rates)
        torch._foreach_copy_(kept, list(now.split(1)))
        if self._controller is None:
            return torch.full_like(logs[:, 2:], 1 / len(self._rules))
        names = step.names or ("",) * len(kept)
        s, mu = self._controller(names, now / (1 - rates**step.t), step.t - 1, step.progress)
        return s.exp().unsqueeze(1) * mu


def _base(ref: str | dict[str, Any]) -> Rule:
    """A base rule. Raises ``UsageError`` for one that does not give a direction of a single tensor by its gradient."""
    built = parts.build("optimizer", ref)
    rule = built.obj
    if rule.matrices or rule.sample_every or hasattr(rule, "step") or type(rule).update is Rule.update:
        raise UsageError(
            f"{built.id} cannot be a base: it gives no direction of a single tensor by its gradient alone",
            where="optimizer.l3rs.bases", hint=f"{json.dumps(['adamw', 'sgd-momentum'])} is the default.",
        )  # fmt: skip
    return rule
