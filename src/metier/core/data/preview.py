"""Data as the model will see them: text with the stretches that carry loss marked."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from metier.core.data.encode import Encoder, Item

OPEN, CLOSE = "⟦", "⟧"


def stretches(tokenizer: Any, item: Item) -> list[list[tuple[str, bool]]]:
    """Per branch (prompt, answers): text and whether its tokens are targets."""
    prompt_loss = item.prompt_loss.copy()
    if len(prompt_loss):
        prompt_loss[0] = False
    branches = [(item.prompt, prompt_loss), *zip(item.answers, item.answer_loss, strict=True)]
    out = []
    for ids, loss in branches:
        runs = groupby(zip(ids.tolist(), loss.tolist(), strict=True), key=lambda pair: pair[1])
        out.append([(tokenizer.decode([i for i, _ in run]), bool(on)) for on, run in runs])
    return out


def as_json(tokenizer: Any, item: Item) -> dict[str, Any]:
    """An item as data: lengths, label, and the stretches of every branch."""
    branches = [[{"text": text, "loss": on} for text, on in branch] for branch in stretches(tokenizer, item)]
    return {"id": item.id, "tokens": item.length, "targets": item.targets, "label": item.label, "branches": branches}


def as_text(tokenizer: Any, item: Item) -> str:
    """An item for people: targets stand between ``⟦`` and ``⟧``; every answer of a prompt on its own."""
    prompt, *answers = ["".join(f"{OPEN}{t}{CLOSE}" if on else t for t, on in b) for b in stretches(tokenizer, item)]
    label = "" if item.label is None else f", label {item.label}"
    lines = [f"{item.id}  {item.length} tokens, {item.targets} with loss{label}", prompt]
    return "\n".join([*lines, *(f"— answer {k + 1}: {a}" for k, a in enumerate(answers))])


def render(examples: Sequence[Any], model: str, *, json: bool = False, max_length: int = 1 << 20) -> Any:
    """Examples as ``model``'s tokenizer sees them: text, or a JSON-able list with ``json=True``."""
    from metier.core.models import tokenizer_of

    tokenizer = tokenizer_of(model)
    encoder = Encoder(tokenizer, max_length=max_length, truncate="right", on_empty="drop")
    items = [i for i in map(encoder, examples) if i is not None]
    if json:
        return [as_json(tokenizer, i) for i in items]
    return "\n\n".join(as_text(tokenizer, i) for i in items)
