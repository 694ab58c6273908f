"""How token sequences lie in rows: one layout for plain, packed, paired and listed answers.

A row holds *groups*; a group is one prompt (branch 0) followed by one or more answers (branches 1, 2, …). A token sees
the earlier tokens of its own group that are in the prompt or in its own branch. A plain sequence is a group whose tokens
are all in branch 0. Positions continue from the prompt in every branch, so every answer is computed exactly as in
a row of its own, while the prompt is computed once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Rows of tokens and the positions that carry loss; R rows of T positions, N targets, S answers."""

    input_ids: Tensor
    """``[R, T]`` int64."""
    position_ids: Tensor
    """``[R, T]`` int64, restarting in every group and continuing from the prompt in every branch."""
    group: Tensor
    """``[R, T]`` int64; 0 is padding, groups count from 1 within a row."""
    branch: Tensor
    """``[R, T]`` int64; 0 is the prompt (or a plain sequence)."""
    row: Tensor
    """``[N]`` row of the hidden state that predicts each target."""
    col: Tensor
    """``[N]`` its column: the token before the target in the target's own branch."""
    target: Tensor
    """``[N]`` the token to be predicted."""
    sequence: Tensor
    """``[N]`` index in ``0 … S-1`` of the answer (or plain sequence) that the target belongs to."""
    ids: tuple[str, ...]
    """Identity of each example in the batch (file and row), for messages."""
    weight: Tensor | None = None
    """``[N]`` loss weights, or ``None`` for all ones."""
    label: Tensor | None = None
    """Per example: class index ``[B]``, desirability ``[B]``, or scores ``[B, K]``; ``None`` where there is none."""
    reference: Tensor | None = None
    """``[N]`` or ``[S]`` cached log-probabilities under the reference model."""
    old_logps: Tensor | None = None
    """``[N]`` log-probabilities under the policy that sampled the answers."""
    answers: tuple[int, ...] = ()
    """Number of answers of each example, in order; their sum is S."""
    end: Tensor | None = None
    """``[S, 2]`` row and column of the last token of each answer (or plain sequence)."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Further inputs per token ``[R, T]``, passed to the model's forward by name."""
    copies: int = 0
    """Tokens of prompts that stand here again, in rows of other answers: computed, but not credited to the step."""
    filler: bool = False
    """Computed only because other processes have one micro-batch more: adds nothing to the step."""

    @property
    def real_tokens(self) -> int:
        """Tokens without padding that the step is credited with."""
        return 0 if self.filler else int((self.group > 0).sum()) - self.copies

    @property
    def plain(self) -> bool:
        """One right-padded plain sequence per row, so a causal mask alone is right."""
        return int(self.group.max()) <= 1 and not bool(self.branch.any())

    def visible(self) -> Tensor:
        """``[R, T, T]`` bool: may position i (dim 1) see position j (dim 2)? Padding sees itself only."""
        same = self.group.unsqueeze(2) == self.group.unsqueeze(1)
        branch = self.branch.unsqueeze(1)
        mine = (branch == 0) | (branch == self.branch.unsqueeze(2))
        causal = torch.ones(same.shape[1:], dtype=torch.bool, device=same.device).tril()
        eye = torch.eye(same.shape[1], dtype=torch.bool, device=same.device)
        return (same & mine & causal & (self.group > 0).unsqueeze(2)) | eye

    def rule(self, window: int | None = None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """:meth:`visible` as a function of indices ``(row, head, i, j)``, the form that flex attention compiles.

        With ``window``, only tokens nearer than that, counted along the sequence and not along the row.
        """
        group, branch, position = self.group, self.branch, self.position_ids

        def seen(r: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            mine = (branch[r, j] == 0) | (branch[r, j] == branch[r, i])
            found = (group[r, i] > 0) & (group[r, i] == group[r, j]) & mine & (i >= j)
            if window is not None:
                found = found & (position[r, i] - position[r, j] < window)
            return found | (i == j)

        return seen

    def to(self, device: torch.device) -> "Layout":
        """The same rows on another device."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.__dict__.items()}
        return Layout(**{**moved, "extra": {k: v.to(device) for k, v in self.extra.items()}})
