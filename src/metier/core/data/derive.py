"""Examples of one type read as another: pairs as single judged answers, ranked answers as pairs, and so on."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from metier.core.data.examples import Completion, Judged, Preference, Prompted, Ranked

Derivation = tuple[str, Callable[[Any], list[Any]]]


def _judged(e: Preference) -> list[Any]:
    """Both answers of a pair on their own."""
    return [
        Judged(e.prompt, e.chosen, True, id=e.id, meta=e.meta),
        Judged(e.prompt, e.rejected, False, id=f"{e.id}+rejected", meta=e.meta),
    ]


def _of_two(e: Preference) -> list[Any]:
    gap = 1.0 if e.margin is None else e.margin
    return [Ranked(e.prompt, (e.chosen, e.rejected), (gap, 0.0), id=e.id, meta=e.meta)]


def _chosen(e: Preference) -> list[Any]:
    return [Completion(e.prompt, e.chosen, id=e.id, meta=e.meta)]


def _best_and_worst(e: Ranked) -> list[Any]:
    """The answers with the highest and the lowest score; none when all scores are equal or both read the same."""
    best, worst = (f(range(len(e.scores)), key=e.scores.__getitem__) for f in (max, min))
    gap = e.scores[best] - e.scores[worst]
    if gap <= 0 or e.completions[best] == e.completions[worst]:
        return []
    return [Preference(e.prompt, e.completions[best], e.completions[worst], gap, id=e.id, meta=e.meta)]


def _best_and_worst_judged(e: Ranked) -> list[Any]:
    return [j for pair in _best_and_worst(e) for j in _judged(pair)]


def _best(e: Ranked) -> list[Any]:
    best = max(range(len(e.scores)), key=e.scores.__getitem__)
    return [Completion(e.prompt, e.completions[best], id=e.id, meta=e.meta)]


def _prompt(e: Any) -> list[Any]:
    return [Prompted(e.prompt, id=e.id, meta=e.meta)]


DERIVATIONS: dict[tuple[type, type], Derivation] = {
    (Preference, Judged): ("each pair is read as a desirable and an undesirable answer", _judged),
    (Preference, Ranked): ("each pair is read as a list of two", _of_two),
    (Preference, Completion): ("of each pair only the chosen answer is used", _chosen),
    (Ranked, Preference): ("of each list the best and the worst answer make a pair", _best_and_worst),
    (Ranked, Judged): ("of each list the best answer is read as desirable, the worst as undesirable", _best_and_worst_judged),
    (Preference, Prompted): ("of each pair only the prompt is used", _prompt),
    (Completion, Prompted): ("of each example only the prompt is used", _prompt),
    (Ranked, Prompted): ("of each list only the prompt is used", _prompt),
    (Ranked, Completion): ("of each list only the best answer is used", _best),
}


def derive(found: Sequence[Any], wanted: Sequence[type]) -> tuple[list[Any], str] | None:
    """The examples as one of the ``wanted`` types and a sentence that says how, or ``None`` where there is no way."""
    for kind in wanted:
        known = DERIVATIONS.get((type(found[0]), kind))
        if known is not None:
            sentence, make = known
            made = [replace(e) for x in found for e in make(x)]
            left = len({e.id.partition("+")[0] for e in made})
            missing = len(found) - left
            return made, sentence + (f" ({missing} of {len(found)} have no two different scores)" if missing > 0 else "")
    return None
