"""Does an answer keep to the verifiable constraints of its prompt? (In the manner of IFEval, arXiv:2311.07911.)"""

from typing import Any, Literal

import torch
from torch import Tensor

from metier.core import constraints as verifiable
from metier.core.data.examples import Prompt
from metier.core.errors import UsageError
from metier.core.part import part


@part("reward/constraints", paper="arXiv:2412.15282, section 3; constraints as in arXiv:2311.07911", rows=(118,))
def constraints(
    prompts: list[Prompt],
    completions: list[list[str]],
    answers: list[str] | None,
    *,
    of: list[dict[str, Any]] = [],  # noqa: B006
    mode: Literal["soft", "strict"] = "soft",
    without: float | None = None,
) -> Tensor:
    """``s(x, y) = (1/c) Σ_j check_j(y)`` of a prompt's c constraints, or with ``mode: strict`` 1 when all hold, else 0.

    Constraints are read from the prompt, where they stand as ``source/constraint-pairs`` words them; those of ``of`` are added
    to every prompt: ``{kind: words, relation: at least, number: 50}``, kinds and arguments as in ``metier.core.constraints``.
    Of a conversation all turns are read; the request that an answer may have to repeat is that of the last one.
    A blank answer satisfies nothing. ``[P, K]``; missing answers of shorter rows get 0. ``without`` is the reward of prompts
    without any constraint. Raises ``UsageError`` for such a prompt when it is not given, and for a constraint that is none.
    """
    everywhere = [_constraint(c) for c in of]
    rewards = torch.zeros(len(prompts), max(map(len, completions), default=0))
    for i, (prompt, written) in enumerate(zip(prompts, completions, strict=True)):
        turns = [prompt] if isinstance(prompt, str) else [m.content for m in prompt]
        request = verifiable.read(turns[-1])[0]
        found = [*(own for turn in turns for own in verifiable.read(turn)[1]), *everywhere]
        if not found and without is None:
            raise UsageError(
                f"the prompt {turns[-1][:60]!r} names no constraint that can be checked",
                hint="Give constraints with `of`, or the reward of such prompts with `without`.",
            )
        for k, text in enumerate(written):
            held = [c.holds(text, request) for c in found]
            soft = sum(held) / len(held) if held else float(without or 0.0)
            rewards[i, k] = float(all(held)) if held and mode == "strict" else soft
    return rewards


constraints.example = {"of": [{"kind": "words", "relation": "at least", "number": 3}, {"kind": "no-commas"}]}  # type: ignore[attr-defined]

constraints.takes_messages = True  # type: ignore[attr-defined]


def _constraint(given: dict[str, Any]) -> verifiable.Constraint:
    """One of the option ``of``."""
    if "kind" not in given:
        raise UsageError(f"the constraint {given} has no kind", where="reward/constraints, option of")
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k != "kind"}
    return verifiable.Constraint(given["kind"], arguments)
