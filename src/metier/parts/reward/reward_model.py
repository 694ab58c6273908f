"""What a trained reward model says of an answer."""

from typing import ClassVar

import torch
from torch import Tensor

from metier.core.data.examples import Prompt, Ranked
from metier.core.errors import UsageError
from metier.core.part import Count, part
from metier.core.scores import answer_rewards
from metier.parts.reward._models import opened


@part("reward/reward-model", paper="arXiv:2203.02155, section 3.5", rows=(79,))
class RewardModel:
    """The scalar ``r(x, y)`` that a reward model's head gives at the last token of the answer, its end token.

    ``model`` is the folder of a finished run of a reward model (``objective: bradley-terry``), or a transformers
    sequence-classification folder of a causal model with one output. All answers to a prompt share one computation of it.
    Prompts are rendered by the model's chat template where there is one. What is longer than ``max_length`` loses the beginning
    of its prompt, then the end of its answer. The model is loaded at the first call. Raises ``UsageError`` for other models.
    """

    takes_messages = True
    """Prompts may be conversations."""
    example: ClassVar = {"model": "lab/llama-50k", "device": "cpu"}

    def __init__(self, *, model: str, max_length: Count = 2048, device: str = "auto") -> None:
        self.model, self.max_length, self.device = model, max_length, device

    def __call__(self, prompts: list[Prompt], completions: list[list[str]], answers: list[str] | None) -> Tensor:
        """``[P, K]`` float32; missing completions of shorter rows get 0."""
        rewards = torch.zeros(len(prompts), max(map(len, completions), default=0))
        asked = [i for i, written in enumerate(completions) if written]
        if not asked:
            return rewards
        judging = opened(self.model, "classify", self.max_length, self.device)
        items = []
        for i in asked:
            item = judging.encoder(Ranked(prompts[i], tuple(completions[i]), (0.0,) * len(completions[i])))
            if item is None:
                raise UsageError("nothing of the answers fits beside the prompt", where=f"prompt {i}")
            items.append(item)
        for i, found in zip(asked, judging.scored(items, answer_rewards), strict=True):
            rewards[i, : len(found)] = torch.from_numpy(found).float()
        return rewards
