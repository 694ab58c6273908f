"""TR-DPO: a reference that follows the policy (arXiv:2404.09656)."""

from typing import Any, Literal

import torch
from torch import Tensor

from metier.core.context import Context
from metier.core.data import rounds
from metier.core.errors import UsageError
from metier.core.layout import Layout
from metier.core.part import Count, Fraction, part


@part("hook/tr-dpo", paper="arXiv:2404.09656, equations 5 and 6", rows=(134,), needs=("reference",))
class TrDpo:
    """Every ``every`` steps ``μ ← share π + (1 - share) μ``: ``share`` 1 is the paper's hard update, less the soft one.

    ``every: round`` moves it where a source that lets the model answer begins a new round, before the round's first step: with
    ``share`` 1 the reference is then the model that wrote the answers (SPIN, SPPO, SPA).

    Works with every objective that compares with a reference. The paper's settings: soft 0.6, hard every 512 steps. Needs one
    more copy of what is trained (with an adapter only of the adapter; with sharded weights one of the whole model in every
    process), and is kept in checkpoints. Raises ``UsageError`` with ``reference_scores: cached``, which cannot follow.
    """

    tags = ("constraint/reference/moving",)
    moves_reference = True

    def __init__(self, *, share: Fraction = 0.6, every: Count | Literal["round"] = 512) -> None:
        self.share, self.every = share, every
        self._round = 1
        self._loaded: dict[str, Tensor] = {}
        self._ctx: Context | None = None

    def on_start(self, ctx: Context) -> None:
        """Begin with the weights of the start, or those of a checkpoint."""
        if ctx.reference is None:
            raise UsageError(
                "hook/tr-dpo has nothing to move: the reference scores are cached",
                where="hooks",
                hint="Use reference_scores: live.",
            )
        self._ctx = ctx
        if ctx.reference.state_dict():
            return
        ctx.reference.follow(ctx.model)
        if self._loaded:
            ctx.reference.load_state_dict(self._loaded)

    def on_batch(self, ctx: Context, layouts: list[Layout]) -> None:
        """Move the reference when a new round begins."""
        if self.every != "round":
            return
        found = torch.tensor(float(max((rounds.number(i) for x in layouts for i in x.ids), default=0)))
        newest = int(ctx.engine.largest(found.to(ctx.engine.device)))
        if newest > self._round:
            assert ctx.reference is not None
            ctx.reference.move(self.share)
            self._round = newest

    def on_step(self, ctx: Context) -> None:
        """Move the reference when it is time."""
        if isinstance(self.every, int) and ctx.clock.step % self.every == 0:
            assert ctx.reference is not None
            ctx.reference.move(self.share)

    def state_dict(self) -> dict[str, Any]:
        """Weights of the reference."""
        reference = self._ctx.reference if self._ctx else None
        return {"reference": reference.state_dict() if reference else self._loaded, "round": self._round}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._loaded, self._round = state["reference"], state.get("round", 1)
