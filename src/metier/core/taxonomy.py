"""What kind of preference objective a part is, found out by calling it.

    traits("dpo"), traits({"npo": {"retain_weight": 1.0}})    -> Traits: thirteen fields and tags
    described()                                               -> {id: Traits} of every objective that learns from preferences
    contradictions("dpo")                                     -> what an objective declares that its behaviour denies

The fields are the thirteen columns of arXiv:2407.16216, the tags places in the tree of arXiv:2503.11701. What a loss does with
its inputs is computed, on small synthetic answers: does it change with the reference's scores, with an answer's length, with the
order of tokens; where do its gradients vanish. What no loss can show is declared in the objective's own file, as attributes
of the function or class:

    tags = ("data/quality/noise",)                                    # its places in the tree
    traits = {"model": ("preference", "fits win probabilities")}      # a field's value, and why

Where nothing is declared a field has its usual value, and the place of the loss in the tree is the computed one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from metier.core import part
from metier.core.batch import Lists, Pairs, Rated, Rewards, Rollouts, Tokens
from metier.core.errors import UsageError
from metier.core.lossmodule import batch_type, scores_again
from metier.core.part import Built

FIELDS: dict[str, dict[str, str]] = {
    "reward": {"explicit": "reads scores as numbers, or trains what gives them", "implicit": "reads which answer is better"},
    "model": {"pointwise": "every answer has a reward of its own", "preference": "pairs have win probabilities, maybe cyclic"},
    "level": {"response": "an answer counts by its sum or mean", "token": "it matters where in the answer a token stands"},
    "signs": {"both": "good answers up, bad ones down", "negative": "bad ones down", "positive": "good ones up"},
    "feedback": {"preference": "which answer is better", "binary": "answers marked good or bad", "score": "a number per answer"},
    "arity": {"pair": "two answers", "list": "several answers", "single": "one answer"},
    "annotator": {"any": "labels come with the data", "human": "people", "ai": "a model labels", "none": "no labels"},
    "reference": {"based": "reads scores under a reference", "free": "does without"},
    "length": {"none": "lengths play no part", "mean": "means per token", "explicit": "a term or weight with lengths"},
    "divergence": {"none": "none", "reverse-kl": "KL(π ‖ μ)", "forward-kl": "KL(μ ‖ π)", "js": "Jensen-Shannon", "alpha": "α"},
    "policy": {"off": "answers of any origin", "on": "answers of the model as it is"},
    "loop": {"offline": "data fixed before", "iterative": "made for rounds of new data", "online": "new data at every step"},
    "sft": {"separate": "no likelihood term", "merged": "with a likelihood term on good answers"},
}  # fmt: skip
"""Field -> value -> meaning."""
JUDGED = {"model": "pointwise", "annotator": "any", "divergence": "none", "policy": "off", "loop": "offline"}
"""Fields that behaviour does not show, with their usual values; with a reference the usual divergence is the reverse KL."""
TAGS = {
    "data/quality/groups": "several populations of annotators",
    "data/quality/gap": "how far apart or how hard the pairs are",
    "data/quality/noise": "wrong labels",
    "data/feedback/point": "single answers",
    "data/feedback/pair": "pairs",
    "data/feedback/list": "lists",
    "data/granularity/token": "credit within an answer",
    "data/granularity/step": "credit by steps of a solution",
    "learning/paradigm/offline": "fixed data",
    "learning/paradigm/online": "new answers while training",
    "learning/paradigm/active": "chooses what to have labelled",
    "learning/objective/several": "several goals",
    "learning/objective/self-play": "the model against itself",
    "constraint/reference/free": "no reference",
    "constraint/reference/moving": "a reference that changes",
    "constraint/divergence/diversity": "divergences that keep answers diverse",
    "constraint/divergence/generalisation": "other forms of the same regularisation",
    "constraint/safety": "a limit beside the goal",
    "model/generation/shift": "pairs that the policy would not write",
    "model/generation/length": "length bias",
    "model/optimisation/likelihood": "good answers do not become less likely",
    "model/optimisation/tax": "keeps earlier abilities",
}
"""The tree of tags: path -> what is changed there."""
SHOWN = (
    "data/feedback/", "data/granularity/token", "learning/paradigm/", "constraint/reference/free", "model/generation/length",
    "model/optimisation/likelihood",
)  # fmt: skip
"""Tags that behaviour shows: an objective may declare them, but has to earn them."""


@dataclass(frozen=True)
class Traits:
    """The record of one objective; values and their meanings are in ``FIELDS``."""

    reward: str
    model: str
    level: str
    signs: str
    feedback: str
    arity: str
    annotator: str
    reference: str
    length: str
    divergence: str
    policy: str
    loop: str
    sft: str
    tags: tuple[str, ...] = ()
    """Sorted: declared, and those that behaviour shows."""
    declared: tuple[str, ...] = ()
    """The tags that the objective's file names: what it is for."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why, for fields that were judged and have not their usual value."""
    reads: str = ""
    """Name of the batch type."""


def traits(ref: Any) -> Traits:
    """The record of an objective, ``"dpo"`` or ``{"logic": {"code": "*+-."}}``; options without a default are those of its
    ``example``. Raises ``UsageError`` for an objective that does not learn from preferences, and for an unknown one."""
    return _named(ref) if isinstance(ref, str) else of(_built(ref))


def described() -> dict[str, Traits]:
    """The records of all objectives that learn from preferences, by id; those that refuse the synthetic answers are left out."""
    found = {}
    for item in part.listing():
        if item.kind == "objective":
            try:
                found[item.id] = _named(item.id)
            except UsageError:
                continue
    return found


@cache
def _named(ref: str) -> Traits:
    return of(_built(ref))


def _built(ref: Any) -> Built:
    name, given = part.split_ref(ref, "objective")
    name = part.find(name, "objective").name
    return part.build("objective", {name: {**getattr(part.load(name, "objective"), "example", {}), **given}})


def of(built: Built) -> Traits:
    """:func:`traits` of an objective that is built already."""
    case = _case(built)
    tags, judged = _declared(built)
    shown = _computed(case)
    values = _values(shown, judged)
    reasons = {k: why for k, (v, why) in judged.items() if values[k] == v}
    every = tuple(sorted({*tags, *_shown_tags(case, values)}))
    return Traits(**values, tags=every, declared=tags, reasons=reasons, reads=case.reads.__name__)


def _values(shown: Mapping[str, str], judged: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """All thirteen fields: what behaviour shows goes before what is declared, and that before the usual."""
    usual = {**JUDGED, **({"divergence": "reverse-kl"} if shown["reference"] == "based" else {})}
    return {**usual, **{k: v for k, (v, _) in judged.items()}, **shown}


def contradictions(ref: Any) -> list[str]:
    """What is wrong with an objective's declarations, in words; empty when its behaviour bears them out. ``ref`` as in
    :func:`traits`, or a built objective."""
    built = ref if isinstance(ref, Built) else _built(ref)
    case, (tags, judged) = _case(built), _declared(built)
    found = _computed(case)
    wrong = [f"unknown tag {t}" for t in tags if t not in TAGS]
    wrong += [f"unknown field {f}" for f in judged if f not in FIELDS]
    wrong += [f"{f} cannot be {v}" for f, (v, _) in judged.items() if v not in FIELDS.get(f, {})]
    wrong += [f"{f} is said to be {v}, but is {found[f]}" for f, (v, _) in judged.items() if found.get(f, v) != v]
    wrong += [f"{f} has no reason" for f, (_, why) in judged.items() if not why]
    earned = _shown_tags(case, _values(found, judged))
    wrong += [f"{t} is said, but not shown" for t in tags if t.startswith(SHOWN) and t not in earned]
    reads = _moves(case, World(), World(ref_shift=1.0))
    if reads != (found["reference"] == "based"):
        wrong.append(
            f"reference is {found['reference']}, but the loss {'changes' if reads else 'does not change'} with its scores"
        )
    return wrong


# --- synthetic answers ---------------------------------------------------------------------------------------

UNITS, TOKENS, SAMPLES, WORDS = 4, 4, 2, 5
READS = (Pairs, Rated, Lists, Rewards, Rollouts)


@dataclass(frozen=True)
class World:
    """Answers token by token, good and bad, and what is changed about them: each test is two worlds that differ in one thing."""

    good: float | None = None
    """Log-ratio of the good answers to the reference, summed; random by default."""
    bad: float | None = None
    split: bool = False
    """Bad answers have twice the tokens, of half the log-probability each."""
    repeated: bool = False
    """Bad answers have twice the tokens, of the same log-probability."""
    uneven: float = 0.0
    """Moved from one token to another within each answer."""
    ref_shift: float = 0.0
    """Changes of random size in the reference's scores."""
    gap: float = 1.0
    """Difference of the given scores."""


@dataclass(frozen=True)
class Answers:
    """Log-probabilities per token ``[B, n]`` of policy and reference."""

    logps: Tensor
    ref: Tensor


def _answers(world: World, side: int) -> Answers:
    rng = torch.Generator().manual_seed(side)
    ref, ratio, noise = (torch.rand(UNITS, TOKENS, generator=rng, dtype=torch.float64) for _ in range(3))
    wanted = (world.good, world.bad)[side]
    if wanted is None:
        ref, ratio = -0.2 - 1.5 * ref, 1.6 * ratio - 1.1
    else:  # both sides equally likely under the reference
        ref, ratio = torch.full_like(ref, -0.9), torch.full_like(ratio, wanted / TOKENS)
    bend = world.uneven * torch.tensor([1.0, 0.0, 0.0, -1.0], dtype=torch.float64)
    logps, ref = ref + ratio + bend, ref - world.ref_shift * noise
    if side == 1 and (world.split or world.repeated):
        logps, ref = (v.repeat_interleave(2, 1) / (2 if world.split else 1) for v in (logps, ref))
    return Answers(logps, ref)


@dataclass(frozen=True)
class Case:
    """An objective with what it takes to call it."""

    built: Built
    reads: type
    needs: frozenset[str]


def _case(built: Built) -> Case:
    reads = None if scores_again(built.obj) else batch_type(built.obj)
    if reads not in READS:
        what = reads.__name__ if reads else "no scores of its own"
        raise UsageError(f"{built.id} reads {what}: it does not learn from preferences", hint="See: metier list objective")
    return Case(built, reads, built.needs)


def _declared(built: Built) -> tuple[tuple[str, ...], dict[str, tuple[str, str]]]:
    obj = built.obj.func if isinstance(built.obj, partial) else type(built.obj)
    return tuple(getattr(obj, "tags", ())), dict(getattr(obj, "traits", {}))


def _tokens(case: Case, both: list[Answers], many: int) -> Tokens:
    """Scores per token of ``many`` answers per unit, which alternate between the sides as listed."""
    rows = [(a.logps[i], a.ref[i]) for i in range(UNITS) for a in both]
    logps, ref = (torch.cat(v) for v in zip(*rows, strict=True))
    sequence = torch.arange(UNITS * many).repeat_interleave(torch.tensor([len(p) for p, _ in rows]))
    rng = torch.Generator().manual_seed(9)
    logits, ref_logits = (torch.randn(len(logps), WORDS, generator=rng, dtype=logps.dtype) for _ in range(2))
    whole: dict[str, Tensor] = {}
    if "logits" in case.needs:
        whole = {"logits": logits, "ref_logits": ref_logits, "targets": torch.zeros(len(logps), dtype=torch.long)}
    # tokens as likely, against those that the policy draws, in every world: what depends on that says nothing of lengths
    return Tokens(logps, torch.ones_like(logps), sequence, ref, collision=logps.detach() + 0.5, **whole)


def _batch(case: Case, world: World, good: Tensor, bad: Tensor) -> Any:
    """The batch of a world whose policy scores are ``good`` and ``bad`` ``[B, n]``. Reference scores are always there."""
    sides = Answers(good, _answers(world, 0).ref), Answers(bad, _answers(world, 1).ref)
    (w, rw), (l, rl) = ((a.logps.sum(1), a.ref.sum(1)) for a in sides)  # noqa: E741
    nw, nl = (torch.full_like(w, float(a.logps.shape[1])) for a in sides)
    gap = torch.full_like(w, world.gap)
    fixed = torch.linspace(-6, -3, UNITS * SAMPLES, dtype=w.dtype).view(UNITS, SAMPLES)
    if case.reads is Pairs:
        return Pairs(w, l, nw, nl, rw, rl, gap, fixed, torch.full_like(fixed, 4.0), fixed - 0.2, _tokens(case, list(sides), 2))
    if case.reads is Rewards:
        return Rewards(w, l, gap)
    if case.reads is Rollouts:
        t = _tokens(case, list(sides), 2)
        return Rollouts(t.logps, t.logps.detach(), t.sequence, torch.stack([gap, gap * 0], 1), t.ref_logps)
    if case.reads is Rated:
        label = torch.tensor([True, False]).repeat_interleave(UNITS)
        other = fixed.flatten()
        return Rated(torch.cat([w, l]), torch.cat([nw, nl]), label, torch.cat([rw, rl]), other, other - 0.2)
    order = [0, 1, 1, 0]  # two good and two bad ones: also the diagonal of a square of two by two
    values = [torch.stack([(x, y)[i] for i in order], 1) for x, y in ((w, l), (nw, nl), (rw, rl))]
    score = torch.tensor(order, dtype=w.dtype).expand(UNITS, -1) * -world.gap + 1
    tokens = _tokens(case, [sides[i] for i in order], 4)
    return Lists(values[0], values[1], score, torch.ones(UNITS, 4, dtype=torch.bool), values[2], tokens)


# --- what a loss does ----------------------------------------------------------------------------------------


def _called(case: Case, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and gradients of their sum in the summed log-probabilities of good and bad answers, ``[B]`` each."""
    leaves = [_answers(world, side).logps.clone().requires_grad_() for side in (0, 1)]
    batch = _batch(case, world, leaves[0], leaves[1])
    with _state(case.built.obj, batch):
        result = case.built.obj(batch)
    loss = result[0] if isinstance(result, tuple) else result
    grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True) if loss.requires_grad else (None, None)
    good, bad = (torch.zeros(UNITS, dtype=loss.dtype) if g is None else g.mean(1) for g in grads)
    return loss.detach(), good, bad


class _state:
    """An objective that has seen the batch, as in training; its own state comes back afterwards."""

    def __init__(self, obj: Any, batch: Any) -> None:
        self.obj, self.batch = obj, batch
        self.kept = obj.state_dict() if hasattr(obj, "observe") else None

    def __enter__(self) -> None:
        if self.kept is not None:
            self.obj.observe(self.batch)

    def __exit__(self, *_: object) -> None:
        if self.kept is not None:
            self.obj.load_state_dict(self.kept)


def _same(a: Tensor, b: Tensor, rel: float = 1e-7) -> bool:
    return bool(torch.allclose(a, b, rtol=rel, atol=1e-12))


def _moves(case: Case, one: World, other: World) -> bool:
    """Does the loss, or a gradient, differ between two worlds?"""
    return not all(_same(a, b) for a, b in zip(_called(case, one), _called(case, other), strict=True))


def _computed(case: Case) -> dict[str, str]:
    """The fields that behaviour and batch type show."""
    single = {Rated: "binary", Rollouts: "score"}
    online = case.reads is Rollouts or "policy" in case.needs
    scored = case.reads in (Rewards, Rollouts) or (case.reads is not Rated and _moves(case, World(gap=1e-3), World(gap=2e-3)))
    return {
        "reward": "explicit" if scored else "implicit",
        "level": "token" if _moves(case, World(), World(uneven=0.1)) else "response",
        "signs": _signs(case),
        "feedback": single.get(case.reads, "preference"),
        "arity": {Lists: "list", Rated: "single", Rollouts: "list"}.get(case.reads, "pair"),
        "reference": "based" if "reference" in case.needs else "free",
        "length": _length(case),
        "sft": "merged" if _likelihood(case) else "separate",
        **({"policy": "on"} if online else {}),
    }


def _signs(case: Case) -> str:
    good, bad = (any(bool((_called(case, w)[side].abs() > 1e-12).any()) for w in (World(), World(good=-3.0, bad=3.0)))
                 for side in (1, 2))  # fmt: skip
    return "both" if good and bad else "positive" if good else "negative"


def _length(case: Case) -> str:
    """How the push on bad answers follows their length."""
    plain = _called(case, World())[2]
    if _same(plain, _called(case, World(split=True))[2]):
        return "none"
    return "mean" if _same(plain, 2 * _called(case, World(repeated=True))[2]) else "explicit"


def _likelihood(case: Case) -> bool:
    """Are good answers still pushed up, with the same force at every likelihood, where bad ones have gone for good?"""
    (_, near, bad), (_, far, _) = (_called(case, World(good=g, bad=-1e6)) for g in (0.4, -100.0))
    return _same(near, far, rel=1e-6) and bool((near < -1e-9).all()) and bool((bad.abs() < 1e-9).all())


def _anchored(case: Case) -> bool:
    """Where good answers have fallen, and bad ones further: is the push up the stronger one?"""
    _, good, bad = _called(case, World(good=-5.0, bad=-8.0))
    return bool((good + bad < -1e-3 * (good.abs() + bad.abs())).all())


def _shown_tags(case: Case, shown: Mapping[str, str]) -> set[str]:
    """Places in the tree that follow from behaviour."""
    tests: dict[str, bool | Callable[[], bool]] = {
        f"data/feedback/{'point' if shown['arity'] == 'single' else shown['arity']}": True,
        "data/quality/gap": shown["reward"] == "explicit" and case.reads not in (Rewards, Rollouts),
        "data/granularity/token": shown["level"] == "token",
        f"learning/paradigm/{'offline' if shown['loop'] == 'offline' and shown['policy'] == 'off' else 'online'}": True,
        "constraint/reference/free": shown["reference"] == "free" and case.reads is not Rewards,
        "model/generation/length": shown["length"] != "none",
        "model/optimisation/likelihood": case.reads is not Rewards and shown["signs"] == "both" and _anchored(case),
    }
    return {tag for tag, there in tests.items() if there}


def columns() -> list[str]:
    """Names of the thirteen fields in order."""
    return [f.name for f in fields(Traits)][: len(FIELDS)]
