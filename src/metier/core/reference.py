"""The reference model of a run: frozen, or following the trained one."""

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn

from metier.core.layout import Layout
from metier.core.scores import Reference, reference_scorer
from metier.core.shards import is_sharded, opened


class ReferenceModel:
    """Scores under the reference; ``initial`` is what it was at the start, whatever happened since.

    ``reference(layout, logits)`` gives ``[N]`` log-probabilities or ``[N, V]`` logits.
    """

    def __init__(self, initial: Reference, name: str, fingerprint: str) -> None:
        self.initial, self.name, self.fingerprint = initial, name, fingerprint
        self._current = initial
        self._pairs: list[tuple[str, Tensor, Tensor]] = []
        self._shell: Any = None

    def __call__(self, layout: Layout, logits: bool) -> Tensor:
        """Scores under the reference as it is now."""
        return self._current(layout, logits)

    def prepare(self, model: Any) -> None:
        """Keep the modules of ``model`` without its weights: :meth:`follow` needs them when these are about to be sharded."""
        empty = {id(p): nn.Parameter(p.new_empty(0), requires_grad=False) for p in model.parameters()}
        self._shell = copy.deepcopy(model, dict(empty))

    def follow(self, model: Any) -> None:
        """From now on score under a copy of ``model`` as it is, which :meth:`move` can move.

        Frozen weights are shared. Of sharded weights every process has a whole copy, the frozen ones included.
        """
        if any(is_sharded(p) for p in model.parameters()):
            assert self._shell is not None, "sharded modules cannot be copied: prepare() has to come before"
            twin = _filled(self._shell, model)
        else:
            twin = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
        own = {n: p for n, p in model.named_parameters() if p.requires_grad}
        theirs = dict(twin.named_parameters())
        self._pairs = [(n, theirs[n].data, p) for n, p in own.items()]
        for p in twin.parameters():
            p.requires_grad_(False)
        self._current = reference_scorer(twin.eval(), contextlib.nullcontext)

    @torch.no_grad()
    def move(self, share: float) -> None:
        """``reference ← (1 - share) reference + share model``, weight by weight; ``share`` 1 copies the model.

        Collective when weights are sharded: they are gathered one at a time.
        """
        for _, theirs, own in self._pairs:
            theirs.lerp_(opened(own.detach(), whole=True).to(theirs.dtype), share)

    def state_dict(self) -> dict[str, Tensor]:
        """Weights of a reference that moves."""
        return {name: theirs for name, theirs, _ in self._pairs}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse, after :meth:`follow`."""
        for name, theirs, _ in self._pairs:
            theirs.copy_(state[name])


@torch.no_grad()
def _filled(shell: Any, model: Any) -> Any:
    """``shell`` with the weights of a sharded model, gathered one at a time, and its buffers."""
    given = dict(model.named_parameters())
    for name, p in shell.named_parameters():
        p.data = opened(given[name].detach(), whole=True).clone()
    for theirs, own in zip(shell.buffers(), model.buffers(), strict=True):
        theirs.copy_(own)
    return shell
