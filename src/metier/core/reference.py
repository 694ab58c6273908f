"""The reference model of a run: frozen, or following the trained one."""

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor

from metier.core.layout import Layout
from metier.core.scores import Reference, reference_scorer


class ReferenceModel:
    """Scores under the reference; ``initial`` is what it was at the start, whatever happened since.

    ``reference(layout, logits)`` gives ``[N]`` log-probabilities or ``[N, V]`` logits.
    """

    def __init__(self, initial: Reference, name: str, fingerprint: str) -> None:
        self.initial, self.name, self.fingerprint = initial, name, fingerprint
        self._current = initial
        self._pairs: list[tuple[str, Tensor, Tensor]] = []

    def __call__(self, layout: Layout, logits: bool) -> Tensor:
        """Scores under the reference as it is now."""
        return self._current(layout, logits)

    def follow(self, model: Any) -> None:
        """From now on score under a copy of ``model`` as it is, which :meth:`move` can move. Frozen weights are shared."""
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
        twin = copy.deepcopy(model, dict(shared))
        own = {n: p for n, p in model.named_parameters() if p.requires_grad}
        theirs = dict(twin.named_parameters())
        self._pairs = [(n, theirs[n].data, p) for n, p in own.items()]
        for p in twin.parameters():
            p.requires_grad_(False)
        for p in shared.values():
            p.requires_grad_(False)
        self._current = reference_scorer(twin.eval(), contextlib.nullcontext)

    @torch.no_grad()
    def move(self, share: float) -> None:
        """``reference ← (1 - share) reference + share model``, weight by weight; ``share`` 1 copies the model."""
        for _, theirs, own in self._pairs:
            theirs.lerp_(own.detach().to(theirs.dtype), share)

    def state_dict(self) -> dict[str, Tensor]:
        """Weights of a reference that moves."""
        return {name: theirs for name, theirs, _ in self._pairs}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse, after :meth:`follow`."""
        for name, theirs, _ in self._pairs:
            theirs.copy_(state[name])
