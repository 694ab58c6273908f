"""What a reward part says of answers to examples: conversations for rewards that take them, and the right answers of rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from metier.core.data.examples import Prompt


def judged(reward: Any, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]], answers: list[str] | None) -> list[np.ndarray]:
    """What a reward says of each prompt's answers: for each ``[K]`` float64, of any K."""
    found = reward(shown(reward, prompts), [list(t) for t in texts], answers)
    return [np.asarray(row[: len(t)], np.float64) for row, t in zip(found.tolist(), texts, strict=True)]


def shown(reward: Any, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts as a reward reads them: conversations as such where it takes them, else as their text."""
    bare = getattr(reward, "func", reward)  # of a function its options are bound by a partial
    return list(prompts) if getattr(bare, "takes_messages", False) else [plain(p) for p in prompts]


def plain(prompt: Prompt) -> str:
    """A prompt as text: a single turn as it is, several with an empty line between them."""
    return prompt if isinstance(prompt, str) else "\n\n".join(m.content for m in prompt)


def known_answers(found: Sequence[Any]) -> list[str] | None:
    """The right answers that examples bring in ``answer`` of their row; ``None`` unless all do."""
    answers = [e.meta.get("answer") for e in found]
    return [str(a) for a in answers] if answers and all(a is not None for a in answers) else None
