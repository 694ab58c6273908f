"""The word language's gold rewards with the signature of a reward part.

In a run file: ``reward: {python: {function: metier.lab.judges:quality}}``.
"""

from functools import partial

from metier.lab.words import REWARDS


def _judge(name: str, prompts: list[str], completions: list[list[str]], answers: list[str] | None) -> list[list[float]]:
    """``[P, K]`` rewards."""
    return [[REWARDS[name](p, text) for text in row] for p, row in zip(prompts, completions, strict=True)]


quality, lexicon, attributes = (partial(_judge, name) for name in ("quality", "lexicon", "attributes"))
