"""NEFTune: noise on the embeddings while training (arXiv:2310.05914, algorithm 1)."""

from typing import Any

import torch
from torch import Tensor, nn

from metier.core import aux, models
from metier.core.context import Context
from metier.core.layout import Layout
from metier.core.part import NonNegative, part


@part("hook/neftune", paper="arXiv:2310.05914", rows=(57,))
class NEFTune:
    """``x' = x + alpha / sqrt(L d) u`` with ``u ~ U(-1, 1)`` on every embedding entry, in training forward
    passes only.

    ``d`` is the width and ``L`` the real length of the token's own sequence: neither padding nor the other
    sequences of a packed row count. An answer of a pair has the length of prompt and answer; a shared prompt
    that of the longest. Modules in evaluation mode (held-out data, reference log-probabilities) get no noise.
    Computing the same rows twice within a step gives the same noise, so differences between the passes are
    not due to it.
    """

    def __init__(self, *, alpha: NonNegative = 5.0) -> None:
        self.alpha = alpha
        self._ctx: Context | None = None
        self._handle: Any = None

    def on_start(self, ctx: Context) -> None:
        """Listen to the embedding layer."""
        self._remove()
        self._ctx = ctx
        self._handle = models.embeddings(ctx.model).register_forward_hook(self._add)

    def on_end(self, ctx: Context) -> None:
        """Leave the model as it was."""
        self._remove()

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _add(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        layout, ctx = aux.layout(), self._ctx
        if not module.training or layout is None or ctx is None:
            return output
        which = next((i for i, known in enumerate(ctx.layouts) if known is layout), -1)
        # A stream of its own per micro-batch: dropout draws the same with and without this hook.
        noise = torch.rand(output.shape, generator=ctx.generator(f"neftune {which}"), device=output.device) * 2 - 1
        real = layout.group > 0
        scale = self.alpha * real / (lengths(layout).clamp(min=1) * output.shape[-1]).sqrt()
        return output + (noise * scale.unsqueeze(-1)).to(output.dtype)


def lengths(layout: Layout) -> Tensor:
    """``[R, T]`` float: the number of real tokens of the sequence that each token belongs to."""
    group, branch = layout.group, layout.branch
    groups, branches = int(group.max()) + 1, int(branch.max()) + 1
    count = torch.zeros(group.shape[0], groups * branches, device=group.device)
    count.scatter_add_(1, group * branches + branch, torch.ones_like(group, dtype=count.dtype))
    count = count.view(-1, groups, branches)
    prompt, answers = count[..., :1], count[..., 1:]
    longest = answers.amax(-1, keepdim=True) if branches > 1 else torch.zeros_like(prompt)
    whole = torch.cat([prompt + longest, prompt + answers], -1).view(-1, groups * branches)
    return whole.gather(1, group * branches + branch)
