"""Max-logit monitor: the largest attention logit and the entropy of attention, while training (arXiv:2410.16682)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metier.core import aux
from metier.core.attention import Seen, observe
from metier.core.context import Context
from metier.core.part import Count, part


@part("hook/max-logit", paper="arXiv:2410.16682", rows=(9,))
class MaxLogit:
    """Every ``every`` steps: ``max |q·k| / sqrt(d)`` over all layers, heads and visible pairs, and the mean entropy.

    Logits are those before caps, temperatures and other maps, so they show the growth that a cap hides; the entropy
    ``-sum p log p`` [nats] is of the weights in use, averaged over layers, heads and real tokens. Seen on the step's first
    micro-batch of every process. Metrics ``max_logit`` and ``attention_entropy``; with ``layers`` also a ``notice`` with
    both for every layer. A first logit several times its usual value precedes a diverging loss; entropy towards 0 means
    that heads look at one token.

    Queries and keys are those of the running step (nothing is computed by the model again), and the model's outputs stay
    bit for bit. Cost on an observed step: one more ``q k^T`` and softmax of that micro-batch, without gradient, in slices
    of at most 32 MB; half of a forward pass for lab/llama-1m at 8 x 128 tokens. Steps in between cost a comparison a layer.
    """

    def __init__(self, *, every: Count = 10, layers: bool = False) -> None:
        self.every, self.layers = every, layers
        self._ctx: Context | None = None
        self._undo: Callable[[], None] | None = None
        self._active = False
        self._found: dict[int, list[Tensor]] = {}
        """By module: largest logit, sum of entropies, number of tokens times heads."""

    def on_start(self, ctx: Context) -> None:
        """Watch the attention modules."""
        self._stop()
        self._ctx = ctx
        self._undo = observe(ctx.model, self._see, "hook/max-logit")

    def on_batch(self, ctx: Context, batch: Any) -> None:
        """Decide whether this step is one to look at."""
        self._active = (ctx.clock.step + 1) % self.every == 0
        self._found = {}

    def on_eval_start(self, ctx: Context) -> None:
        """Evaluations are not watched."""
        self._active = False

    def on_step(self, ctx: Context) -> None:
        """Put what was seen into the step's metrics; all processes give the same."""
        if not self._active:
            return
        self._active = False
        found = torch.stack([torch.stack(x).double() for x in self._found.values()]).tolist() if self._found else []
        tops = [0.0] * ctx.engine.world
        tops[ctx.engine.rank] = max((x[0] for x in found), default=0.0)
        *tops, total, count = ctx.engine.sum([*tops, sum(x[1] for x in found), sum(x[2] for x in found)])
        ctx.metrics["max_logit"] = max(tops)
        ctx.metrics["attention_entropy"] = total / max(count, 1)
        if self.layers:
            rows = [{"max_logit": top, "entropy": entropy / max(n, 1)} for top, entropy, n in found]
            ctx.emit({"event": "notice", "step": ctx.clock.step, "text": "attention by layer", "layers": rows})

    def on_end(self, ctx: Context) -> None:
        """Leave the model as it was."""
        self._stop()

    def _stop(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None

    def _see(self, seen: Seen) -> None:
        layout, ctx = aux.layout(), self._ctx
        if not self._active or not seen.learning or ctx is None or layout is None or layout is not ctx.layouts[0]:
            return
        shape = (*seen.query.shape[:3], 1)
        if layout.group.shape != (shape[0], shape[2]):
            return
        real = (layout.group > 0)[:, None, :, None].expand(shape)
        for rows, z, p, visible in seen.rows():
            here = real[:, :, rows]
            new = [
                z.abs().masked_fill(~(here & visible), 0).amax(),
                torch.special.entr(p).sum(-1, keepdim=True).masked_fill(~here, 0).sum(),
                here.sum(),
            ]
            old = self._found.get(id(seen.module))
            self._found[id(seen.module)] = (
                new if old is None else [torch.maximum(old[0], new[0]), old[1] + new[1], old[2] + new[2]]
            )
