"""A language model as judge: asked with a rubric, its answer read from the probabilities of the score tokens."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from metier.core.data.encode import Item
from metier.core.data.examples import Prompt
from metier.core.errors import UsageError
from metier.core.forward import hidden_states
from metier.core.part import Count, part
from metier.core.scores import head_logits
from metier.parts.reward._models import Judging, opened

RUBRIC = "Judge how well the answer does what the prompt asks: is it correct, complete, honest and clear?"
SCORES, SIDES = ("1", "2", "3", "4", "5"), ("A", "B")
ASK = {
    "score": "Rate the answer from 1 (very bad) to 5 (very good). Reply with the number only.",
    "pairs": "Which answer is better? Reply with A or B only.",
}


@part("reward/judge", paper="arXiv:2306.05685 (judge, both orders); arXiv:2303.16634, section 2 (scores weighted by probability)",
      rows=(79,))  # fmt: skip
class Judge:
    """A local model's opinion of each answer, without sampling: it is the same at every call.

    ``mode: score`` asks for a rating and gives the expected one, ``Σ_k k p(k) / Σ_k p(k)`` over the tokens 1 … 5 that may come
    next. ``mode: pairs`` shows an answer beside each other one of the same prompt, in both orders, and gives the mean of
    ``p(it is better)``: 0.5 for equals whatever the model's liking for a place, and for an answer without rivals.

    ``model`` is a folder, a finished run, ``smollm2-135m-instruct``, a lab model or a hub id; loaded at the first call, then
    kept. ``rubric`` says what to judge by. Right answers are shown where data have them. Answers that make the question longer
    than ``max_length`` are judged by their beginning. Raises ``UsageError`` when a score is no single token of the tokenizer.
    """

    takes_messages = True
    example: ClassVar = {"model": "lab/llama-50k", "device": "cpu"}

    def __init__(
        self, *, model: str, rubric: str = RUBRIC, mode: Literal["score", "pairs"] = "score", max_length: Count = 2048,
        device: str = "auto",
    ) -> None:  # fmt: skip
        self.model, self.rubric, self.mode, self.max_length, self.device = model, rubric, mode, max_length, device

    def __call__(self, prompts: list[Prompt], completions: list[list[str]], answers: list[str] | None) -> Tensor:
        """``[P, K]``; missing completions of shorter rows get 0."""
        rewards = torch.zeros(len(prompts), max(map(len, completions), default=0))
        places, items = [], []
        for i, (prompt, written) in enumerate(zip(prompts, completions, strict=True)):
            for shown in self._shown(len(written)):
                texts = [written[k] for k in shown]
                items.append(self._question(_plain(prompt), texts, answers[i] if answers else None))
                places.append((i, shown))
        if self.mode == "pairs":
            for row, written in zip(rewards, completions, strict=True):
                row[: len(written)] = 0.5 if len(written) == 1 else 0.0
        labels = SCORES if self.mode == "score" else SIDES
        for (i, shown), p in zip(places, self._asked(items, labels), strict=True):
            if self.mode == "score":
                rewards[i, shown[0]] = float(p @ torch.arange(1.0, 6.0, dtype=p.dtype))
            else:
                share = 1 / (2 * (len(completions[i]) - 1))
                for k, mine in zip(shown, p.tolist(), strict=True):
                    rewards[i, k] += mine * share
        return rewards

    def _shown(self, number: int) -> list[tuple[int, ...]]:
        """Which completions each question shows, in order."""
        if self.mode == "score":
            return [(k,) for k in range(number)]
        return [(j, k) for j in range(number) for k in range(number) if j != k]

    def _asked(self, items: list[Item], labels: tuple[str, ...]) -> list[Tensor]:
        """For each question, the probabilities of the labels among each other."""
        if not items:
            return []
        judging = self._judging
        ids = torch.tensor([label_id(judging.tokenizer, x) for x in labels], device=judging.device)

        def last(model: Any, layout: Any) -> Tensor:
            h = hidden_states(model, layout)[layout.end[:, 0], layout.end[:, 1]]
            return head_logits(model, h)[:, ids].double().softmax(1)

        return [torch.from_numpy(p[0]) for p in judging.scored(items, last)]

    @property
    def _judging(self) -> Judging:
        return opened(self.model, "lm", self.max_length, self.device)

    def _question(self, prompt: str, texts: list[str], right: str | None) -> Item:
        """The question as token ids. Raises ``UsageError`` when it is too long even without answers."""
        encoder = self._judging.encoder
        ids = encoder.prompt(self._framed(prompt, texts, right))
        for _ in range(8):
            over = len(ids) - encoder.max_length
            if over <= 0:
                return Item(ids, ids != ids)
            pieces = [encoder.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
            longest = max(range(len(texts)), key=lambda k: len(pieces[k]))
            kept = max(0, len(pieces[longest]) - max(over, 1) - 4)
            texts = [encoder.tokenizer.decode(pieces[k][:kept]) if k == longest else t for k, t in enumerate(texts)]
            ids = encoder.prompt(self._framed(prompt, texts, right))
        raise UsageError(f"the question is longer than {encoder.max_length} tokens without any answer",
                         where=f"reward/judge, prompt {prompt[:40]!r}")  # fmt: skip

    def _framed(self, prompt: str, texts: list[str], right: str | None) -> str:
        heads = ["Answer"] if self.mode == "score" else ["Answer A", "Answer B"]
        known = [] if right is None else [f"### Known right answer\n{right}"]
        parts = [self.rubric, f"### Prompt\n{prompt}", *known, *(f"### {h}\n{t}" for h, t in zip(heads, texts, strict=True))]
        bare = not getattr(self._judging.tokenizer, "chat_template", None)
        return "\n\n".join([*parts, ASK[self.mode], *(["### Reply\n"] if bare else [])])


def label_id(tokenizer: Any, label: str) -> int:
    """The one token of a label. Raises ``UsageError`` when it is not one token, or stands for other text."""
    ids = tokenizer(label, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or tokenizer.decode(ids).strip() != label:
        raise UsageError(f"the score {label!r} is {len(ids)} tokens for this tokenizer, or an unknown one; a judge needs one",
                         where="reward/judge")  # fmt: skip
    return ids[0]


def _plain(prompt: Prompt) -> str:
    """A prompt as text; turns of a conversation with their roles."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{m.role}: {m.content}" for m in prompt)
