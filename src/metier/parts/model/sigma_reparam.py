"""sigmaReparam: linear layers with a learnable spectral norm (arXiv:2303.06296, section 3; as a guard in
arXiv:2410.16682)."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from metier.core import models
from metier.core.errors import UsageError
from metier.core.part import Count, part
from metier.core.targets import is_linear

ADAPTED = "an adapter would be added to the weight behind its spectral norm and merged into the one before it"


@part("model/sigma-reparam", paper="arXiv:2410.16682", rows=(9,), conflicts={"adapter/lora": ADAPTED, "adapter/peft": ADAPTED})
def sigma_reparam(model: Any, *, gamma: Literal["one", "norm"] = "one", warm: Count = 50) -> Any:
    """Every linear layer inside the blocks computes with ``(gamma / sigma(W)) W``, ``gamma`` a learnable scalar.

    ``sigma = u^T W v`` is the spectral norm by power iteration: before it is used in training,
    ``u <- W v / |W v|``, ``v <- W^T u / |W^T u|``; both count as constants, so the gradient of ``sigma`` is ``u v^T``.
    One iteration per forward pass of a *changed* weight: micro-batches of a step, repeated passes and recomputed blocks
    share it, so the update does not depend on how a batch is split. Evaluation uses the vectors as they are.
    ``warm`` iterations at the start stand in for the singular value decomposition of the authors' code.

    ``gamma``: ``one`` (as both papers describe it) or ``norm``, the spectral norm at the start, which leaves the function
    unchanged (the authors' vision code does this). State: float32 buffers ``u`` [out] and ``v`` [in] a layer, saved with the
    model. Cost: four products of matrix and vector a layer and step, and one more copy of the weight for the
    backward pass; 11 % of forward and backward (measured as for qk-norm). Embeddings and output layer stay.
    ``gamma`` gets no weight decay; decay of ``W`` only changes its effective learning rate.

    When to use: against collapsing attention entropy, from scratch. Changes ``model`` in place and returns it: a weight
    is called ``….parametrizations.weight.original`` afterwards. Raises ``UsageError`` when that is done already.
    """
    for block in models.blocks(model):
        linear: list[Any] = [m for m in block.modules() if is_linear(m)]
        for layer in linear:
            if parametrize.is_parametrized(layer):
                raise UsageError(f"{type(model).__name__} already has reparametrised weights", where="model/sigma-reparam")
            if not layer.weight.is_floating_point():
                raise UsageError("quantised weights have no spectral norm to learn", where="model/sigma-reparam")
            new = Spectral(layer.weight, gamma == "norm", warm)
            # Without the trial call, which would be one iteration more.
            parametrize.register_parametrization(layer, "weight", new, unsafe=True)
    return model


class Spectral(nn.Module):
    """``W -> (gamma / sigma(W)) W`` for a matrix in either orientation."""

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, start_at_norm: bool, warm: int) -> None:
        super().__init__()
        w = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        self.register_buffer("u", w.new_zeros(w.shape[0]))
        self.register_buffer("v", nn.functional.normalize(torch.randn(w.shape[1]), dim=0).to(w))
        for _ in range(warm):
            self.iterate(w)
        start = torch.dot(self.u, w @ self.v) if start_at_norm else torch.ones((), device=w.device)
        self.gamma = nn.Parameter(start.to(weight.dtype))
        self.seen: tuple[int, int] | None = None

    def iterate(self, w: Tensor) -> None:
        """One step of the power iteration on the matrix, in float32 at least."""
        u = nn.functional.normalize(w @ self.v.to(w.dtype), dim=0)
        self.u.copy_(u)
        self.v.copy_(nn.functional.normalize(w.T @ u, dim=0))

    def after_step(self) -> None:
        """The weight has changed, however the optimizer wrote it."""
        self.seen = None

    def forward(self, weight: Tensor) -> Tensor:
        """The effective matrix, of the shape and type of ``weight``."""
        with torch.autocast(weight.device.type, enabled=False):
            w = weight.to(torch.promote_types(weight.dtype, torch.float32))
            now = (id(weight), weight._version)
            if self.training and now != self.seen and torch._C._current_graph_task_id() == -1:
                with torch.no_grad():
                    self.iterate(w)
                self.seen = now
            # Copies: a later pass may move the buffers before this one's backward.
            u, v = (t.to(w.dtype, copy=True) for t in (self.u, self.v))
            sigma = torch.dot(u, w @ v)
            return (w * (self.gamma / sigma)).to(weight.dtype)
