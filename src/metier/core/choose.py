"""Which objective to try: a table of records filtered, and suggestions from what is known of data and training.

    suggest(paired=False, noise=0.3)             -> [Suggestion(id, reason, check), …], the best first
    matching(described(), {"reference": "free"}) -> the objectives that need no reference
    places()                                     -> {tag: ids}: where in the tree of tags there is something

Suggestions follow from the records of ``core/taxonomy.py`` alone, so an objective that is added is suggested by itself: those
that can be used with the data, the ones first that were made for most of what is wanted, then those made for nothing else, those
of the reading list, and those with fewest options to tune. Where nothing is wanted in particular the reading list goes first.
"""

from collections.abc import Mapping
from typing import NamedTuple

from metier.core import part
from metier.core.errors import unknown
from metier.core.taxonomy import FIELDS, TAGS, Traits, described

NOISY = 0.1
"""From this share of wrong labels on they are worth a remedy."""
TAGGED = ("objective", "source", "hook")


class Suggestion(NamedTuple):
    """One objective to try."""

    id: str
    reason: str
    """What of the question it answers."""
    check: str
    """What to run or to look at, to see that it does."""


class Wish(NamedTuple):
    """Something a remedy is wanted for: the tag or field that shows one, the reason and the check."""

    key: str
    value: str
    reason: str
    check: str


REMEDIES = {
    "noise": Wish("tag", "data/quality/noise", "allows for wrong labels",
                  "train it and dpo on lab/preferences-flipped: held-out accuracy falls less than with clean labels"),
    "length_bias": Wish("tag", "model/generation/length", "takes length out of the margin",
                        "hook/answers: answer_length stays while answer_reward rises; data lab/preferences-long"),
    "chosen_falling": Wish("tag", "model/optimisation/likelihood", "holds the likelihood of good answers up",
                           "the metric chosen_reward stays above 0 while margin grows"),
    "off_policy": Wish("tag", "model/generation/shift", "weighs pairs by how likely the model itself would write them",
                       "the metric weight is below 1 for answers of other models and near 1 for its own"),
    "scores": Wish("tag", "data/quality/gap", "uses how much better an answer is",
                   "the metric margin grows most for pairs whose scores differ most; with dpo it does not"),
    "diversity": Wish("tag", "constraint/divergence/diversity", "regularises by a divergence that keeps answers diverse",
                      "hook/answers with number: 8: answers to one prompt differ more than with dpo at equal answer_kl"),
    "credit": Wish("tag", "data/granularity/token", "tells tokens apart",
                   "metier probe gradient-coefficients: tokens of one answer get different ones"),
    "untuned": Wish("sft", "merged", "has a likelihood term, and so needs no fine-tuning before",
                    "from a base model the metric nll falls together with the loss"),
}  # fmt: skip
"""Question -> what answers it. Names of objectives in the checks are examples to compare with."""
FREE = Wish("tag", "constraint/reference/free", "needs no reference model", "metier plan: the memory estimate has one model")
PLAIN = "fits these data, with nothing that was not asked for"
COMPARE = "metier compare it with the one before it, at equal tuning; look at reward and KL together"
CACHE = "none of this kind does without a reference: score it once before training (reference_scores: cached)"


def suggest(
    *, paired: bool = True, scored_list: bool = False, noise: float = 0.0, reference_affordable: bool = True,
    length_bias: bool = False, chosen_falling: bool = False, off_policy: bool = False, scores: bool = False,
    diversity: bool = False, credit: bool = False, untuned: bool = False, limit: int = 5,
    table: Mapping[str, Traits] | None = None,
) -> list[Suggestion]:  # fmt: skip
    """Objectives for a situation, the best first. Pure: the same question on the same table has the same answer.

    The data: ``paired`` (else single answers marked good or bad), or a ``scored_list`` of answers per prompt; ``noise``, the
    share of wrong labels; ``scores`` beside the pairs. The budget: ``reference_affordable``. What was seen in training: growing
    length (``length_bias``), a falling likelihood of the chosen answers (``chosen_falling``), pairs the model would not write
    (``off_policy``). What is wanted: ``diversity``, ``credit`` for tokens, to start from a base model (``untuned``).
    """
    asked = {
        "noise": noise >= NOISY, "length_bias": length_bias, "chosen_falling": chosen_falling, "off_policy": off_policy,
        "scores": scores, "diversity": diversity, "credit": credit, "untuned": untuned,
    }  # fmt: skip
    wishes = [REMEDIES[k] for k, wanted in asked.items() if wanted]
    arity = "list" if scored_list else "pair" if paired else "single"
    usable = {id: t for id, t in (described() if table is None else table).items() if _usable(t, arity)}
    without = usable if reference_affordable else {id: t for id, t in usable.items() if t.reference == "free"}
    cached = bool(usable) and not without
    if not reference_affordable and not cached:
        wishes.append(FREE)
    ranked = sorted((without or usable).items(), key=lambda item: _rank(*item, wishes))
    helpful = [(id, t) for id, t in ranked if any(_hit(t, w) for w in wishes)]
    return [_said(id, t, wishes, cached) for id, t in (helpful or ranked)[:limit]]


def _usable(t: Traits, arity: str) -> bool:
    """Trains a policy on data of that form, in both directions."""
    return t.arity == arity and t.signs == "both" and t.reads not in ("Rewards", "Rollouts") and t.annotator != "none"


def _rank(id: str, t: Traits, wishes: list[Wish]) -> tuple:
    hits = -sum(_hit(t, w) for w in wishes)
    elsewhere = len(set(t.declared) - {w.value for w in wishes})
    rows, options = _listed(id)
    return hits, t.policy == "on", elsewhere if wishes else 0, rows, options, id


def _hit(t: Traits, w: Wish) -> int:
    """2 for what an objective was made for, 1 for what it does as well."""
    if w.key != "tag":
        return 2 * (getattr(t, w.key) == w.value)
    return (w.value in t.declared) + (w.value in t.tags)


def _listed(id: str) -> tuple[int, int]:
    """The first row of the reading list that a part stands in (late when in none), and its number of options, which counts as
    large where one is required: something has to be put inside."""
    found = next((p for p in part.listing() if p.id == id), None)
    if found is None:
        return 10**6, 0
    options = part.options(part.load(id)).values()
    return min(found.rows, default=10**6), len(options) + 100 * any(o.required for o in options)


def _said(id: str, t: Traits, wishes: list[Wish], cached: bool) -> Suggestion:
    met = [w for w in wishes if _hit(t, w)]
    reasons = [w.reason for w in met] or [PLAIN if not wishes else "fits these data; no remedy for what was asked"]
    return Suggestion(id, "; ".join([*reasons, *([CACHE] if cached else [])]), met[0].check if met else COMPARE)


# --- tables --------------------------------------------------------------------------------------------------


def matching(table: Mapping[str, Traits], where: Mapping[str, str]) -> dict[str, Traits]:
    """Of a table those whose fields have the values, or that have a tag at or below a place (``{"tag": "model/generation"}``).

    Raises ``UsageError`` for an unknown field or value.
    """
    for key, value in where.items():
        known = {*TAGS, *(t.rsplit("/", n)[0] for t in TAGS for n in (1, 2))} if key == "tag" else FIELDS.get(key)
        if known is None:
            raise unknown("field", key, [*FIELDS, "tag"], where="--where")
        if value not in known:
            raise unknown(f"value of {key}", value, known, where="--where")
    return {id: t for id, t in table.items() if all(_has(t, k, v) for k, v in where.items())}


def _has(t: Traits, key: str, value: str) -> bool:
    return any(f"{x}/".startswith(f"{value}/") for x in t.tags) if key == "tag" else getattr(t, key) == value


def places(table: Mapping[str, Traits] | None = None) -> dict[str, list[str]]:
    """Every tag with the ids of the parts there: objectives by their record, sources and hooks by what they declare."""
    found: dict[str, list[str]] = {tag: [] for tag in TAGS}
    table = described() if table is None else table
    for item in part.listing():
        if item.kind in TAGGED:
            tags = table[item.id].tags if item.id in table else getattr(part.load(item.id), "tags", ())
            for tag in tags:
                found[tag].append(item.id)
    return found
