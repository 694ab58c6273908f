"""The loss's gradient at frozen weights under adapters, and adapters whose start values are made of it.

Nothing needs a gradient of its own for this: inputs ``x [n, in]`` of each layer and gradients ``g [n, out]`` of its output
are caught on the way, and ``gᵀ x`` is summed. So it works for sharded and for quantised weights too.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from metier.core.context import derive_seed
from metier.core.engine import Engine
from metier.core.errors import MetierError
from metier.core.layout import Layout
from metier.core.linalg import gaussian
from metier.core.shards import split_like

EXACT = 512
"""Smaller side of a matrix up to which all its singular vectors are computed."""
OVERSAMPLE, POWERS = 8, 4
"""Extra directions and power iterations of the randomised decomposition (arXiv:0909.4061, algorithm 4.4)."""


def top_singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``U [m, k]``, singular values ``[k]`` falling, ``Vᵀ [k, n]`` of ``matrix [m, n]``; k is ``rank`` or the smaller side.

    Exact up to a smaller side of :data:`EXACT`, beyond it from a sketch that depends on the shape alone. At least float32.
    """
    m = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    k = min(rank, *m.shape)
    if min(m.shape) <= max(EXACT, k + OVERSAMPLE):
        u, s, vt = torch.linalg.svd(m, full_matrices=False)
        return u[:, :k], s[:k], vt[:k]
    q = torch.linalg.qr(m @ gaussian((m.shape[1], k + OVERSAMPLE), like=m)).Q
    for _ in range(POWERS):
        q = torch.linalg.qr(m @ torch.linalg.qr(m.T @ q).Q).Q
    u, s, vt = torch.linalg.svd(q.T @ m, full_matrices=False)
    return (q @ u)[:, :k], s[:k], vt[:k]


def base_gradients(
    module: nn.Module, adapters: Mapping[str, Any], layouts: Sequence[Layout], engine: Engine
) -> dict[str, Tensor]:
    """Gradient ``[out, in]`` of the summed loss of all processes' ``layouts`` at the weight under each adapter.

    ``module`` maps a layout to ``(loss sum, units, metric sums)``. Memory: one float32 copy of these weights. The ``.grad``
    of parameters is as before afterwards.
    """
    kept = [(p, p.grad) for p in module.parameters()]
    with _caught(adapters, engine.device) as sums:
        for layout in layouts:
            with torch.enable_grad(), engine.accumulating(module, last=True):
                with engine.autocast():
                    total, _, _ = module(layout.to(engine.device))
                total.backward()
            for p, _ in kept:
                p.grad = None
    for p, grad in kept:
        p.grad = grad
    return {name: engine.total(g) for name, g in sums.items()}


@contextlib.contextmanager
def _caught(adapters: Mapping[str, Any], device: torch.device) -> Iterator[dict[str, Tensor]]:
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., Tensor]:
        def catch(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return out
            x = args[0].detach()
            # In the first layers nothing before the output needs a gradient; a copy, so that it may be changed in place.
            out = out if out.requires_grad else out.detach().requires_grad_().clone()
            out.register_hook(lambda g: _add(sums[name], g, x))
            return out

        return catch

    handles = []
    for name, adapter in adapters.items():
        base = adapter.base
        wide = torch.promote_types(base.weight.dtype, torch.float32) if base.weight.is_floating_point() else torch.float32
        sums[name] = torch.zeros(base.out_features, base.in_features, dtype=wide, device=device)
        handles.append(base.register_forward_hook(hook(name)))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _add(total: Tensor, g: Tensor, x: Tensor) -> None:
    total.addmm_(g.flatten(0, -2).to(total.dtype).T, x.flatten(0, -2).to(total.dtype))


def start_adapters(session: Any) -> None:
    """Give adapters that ask for it (``LinearAdapter.calibration``) their start values, before the first step of a run.

    The gradient is that of the mean loss on the first steps of training data, in evaluation mode; the data are then read
    from their beginning. Raises ``MetierError`` when a gradient is not finite.
    """
    ctx = session.context
    adapters = {n: a for n, a in getattr(ctx.attached, "adapters", {}).items() if getattr(a, "calibration", 0)}
    if not adapters:
        return
    layouts, units, steps = _first(session.loader, max(a.calibration for a in adapters.values()))
    ctx.model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(ctx.run.train.seed, "calibration", ctx.engine.rank))
        found = base_gradients(ctx.module, adapters, layouts, ctx.engine)
    for name, adapter in adapters.items():
        gradient = found.pop(name) / units
        if not bool(torch.isfinite(gradient).all()):
            raise MetierError(f"the loss's gradient at {name} is not finite before the first step")
        _fill(adapter, gradient)
    ctx.emit({"event": "notice", "text": f"start values of {ctx.attached.built.id} from the gradient of {steps} steps"})


def _first(loader: Any, steps: int) -> tuple[list[Layout], int, int]:
    """Micro-batches, units and number of the next ``steps`` steps; the loader stays where it is."""
    before = loader.state_dict()
    drawn = iter(loader)
    taken = list(islice(drawn, steps))
    drawn.close()
    loader.load_state_dict(before)
    return [layout for step in taken for layout in step.micro], max(1, sum(step.units for step in taken)), len(taken)


@torch.no_grad()
def _fill(adapter: Any, gradient: Tensor) -> None:
    own = adapter.own_state()
    for name, value in adapter.start(gradient).items():
        target = own[name]
        target.copy_(split_like(target, value.to(target.dtype)))
