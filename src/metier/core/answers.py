"""What a policy answers, measured: reward, distance to the reference, win rate, length; and how it ranks given pairs."""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats as distributions

from metier.core import judging, models, trained
from metier.core.batch import Pairs
from metier.core.context import Context
from metier.core.data.encode import Item
from metier.core.data.examples import Prompt
from metier.core.engine import Engine
from metier.core.intervals import student, wilson
from metier.core.klestimate import Reference, answer_stats
from metier.core.models import Bundle
from metier.core.sample import Answer, sample

Judge = Callable[[Sequence[Prompt], Sequence[Sequence[str]], list[str] | None], np.ndarray]
"""``(prompts, answers, right answers) -> [P, K]`` rewards."""


@dataclass(frozen=True)
class Asked:
    """Prompts as examples have them and as the model reads them, and how they are to be answered."""

    prompts: list[Prompt]
    ids: list[np.ndarray]
    known: list[str] | None = None
    """The right answers, where the examples bring them."""
    number: int = 4
    """Answers to each prompt."""
    max_new_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0

    def answers(self, bundle: Bundle, engine: Engine | None = None) -> list[list[Answer]]:
        """The model's answers; the same random numbers for every model. The processes of ``engine`` share the work."""

        def work(share: list[int]) -> list[list[Answer]]:
            return sample(
                bundle.model, bundle.tokenizer, [self.ids[i] for i in share], number=self.number,
                max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed, numbers=share,
            )  # fmt: skip

        return _shared(engine, [len(p) + self.max_new_tokens for p in self.ids], work)


def ask(
    encoder: Any, examples: Sequence[Any], *, limit: int | None = None, number: int = 4, max_new_tokens: int = 64,
    temperature: float = 1.0, seed: int = 0,
) -> Asked:  # fmt: skip
    """The first ``limit`` different prompts of examples made ready."""
    first = {e.prompt: e for e in reversed(examples)}
    prompts = list(dict.fromkeys(e.prompt for e in examples))[:limit]
    known = judging.known_answers([first[p] for p in prompts])
    return Asked(prompts, [encoder.prompt(p) for p in prompts], known, number, max_new_tokens, temperature, seed)


def at_start(ctx: Context) -> tuple[Reference, Bundle, Callable[[], AbstractContextManager]]:
    """A run's model at its start, or its ``reference``: to compare with, as a bundle, and what switches the bundle to it."""
    if ctx.attached is not None and ctx.run.reference is None:
        return ctx.attached.disabled, ctx.bundle, ctx.attached.disabled
    run, device, dtype = ctx.run, ctx.engine.device, next(ctx.model.parameters()).dtype
    start = models.load(run.reference, seed=run.train.seed) if run.reference else trained.at_start(run, device=device)
    return start.model.to(device, dtype).requires_grad_(False).eval(), start, contextlib.nullcontext


def as_judge(reward: Any) -> Judge:
    """A reward part with its options bound, as a judge."""
    return lambda prompts, answers, known: np.stack(judging.judged(reward, prompts, answers, known))


def report(
    bundle: Bundle,
    asked: Asked,
    *,
    reference: Reference | None = None,
    judge: Judge | None = None,
    others: np.ndarray | None = None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Figures of the policy's answers, means over all of them.

    ``length`` (tokens), ``ended``; with ``reference`` ``kl`` (Rao-Blackwellised) and ``kl_mc`` (Monte Carlo), in nats per answer
    and right at temperature 1; with ``judge`` ``reward`` with its 95 % interval (prompts are the units), ``length_correlation``
    (Spearman's, between reward and length), and with the rewards ``others`` ``[P, K]`` of another model's answers ``win_rate``:
    how often the policy's answer is better, ties counting one half, with interval. With ``engine`` its processes share the
    work, and the judge is asked by the first one only.
    """
    answers = asked.answers(bundle, engine)
    lengths = np.array([[len(a.ids) for a in row] for row in answers], float)
    found: dict[str, Any] = {"length": float(lengths.mean()), "ended": float(np.mean([[a.ended for a in r] for r in answers]))}
    if reference is not None:
        distance = _stats(bundle, reference, asked.ids, answers, engine)
        found |= {"kl": float(distance["kl"].mean()), "kl_mc": float(distance["kl_mc"].mean())}
    if judge is not None:
        rewards = _said(judge, asked, answers, engine)
        found |= {"reward": float(rewards.mean()), "reward 95 %": list(student(rewards.mean(1)))}
        found["length_correlation"] = _spearman(rewards.ravel(), lengths.ravel())
        if others is not None:
            wins = np.mean((rewards[:, :, None] > others[:, None]) + 0.5 * (rewards[:, :, None] == others[:, None]), axis=(1, 2))
            found |= {"win_rate": float(wins.mean()), "win_rate 95 %": list(student(wins))}
    return found


def judged(bundle: Bundle, asked: Asked, judge: Judge, engine: Engine | None = None) -> np.ndarray:
    """Rewards ``[P, K]`` of a model's answers."""
    return _said(judge, asked, asked.answers(bundle, engine), engine)


def pair_accuracy(bundle: Bundle, reference: Reference, items: Sequence[Item], engine: Engine | None = None) -> float:
    """How often ``log π/π_ref`` of the first answer is above that of the second; a tie is one half."""
    ratios = _stats(bundle, reference, [i.prompt for i in items], [i.answers[:2] for i in items], engine)["kl_mc"]
    margin = ratios[:, 0] - ratios[:, 1]
    return float(np.mean((margin > 0) + 0.5 * (margin == 0)))


def _shared(engine: Engine | None, costs: list[float], work: Callable[[list[int]], list[Any]]) -> list[Any]:
    return work(list(range(len(costs)))) if engine is None else engine.shared(costs, work)


def _said(judge: Judge, asked: Asked, answers: list[list[Answer]], engine: Engine | None) -> np.ndarray:
    """Rewards of answers that exist; one process judges, since a judge need not say the same again."""

    def ask() -> np.ndarray:
        return judge(asked.prompts, [[a.text for a in row] for row in answers], asked.known)

    return ask() if engine is None else engine.by_main(ask)


def _stats(
    bundle: Bundle, reference: Reference, ids: Sequence[np.ndarray], answers: Sequence[Sequence[Any]], engine: Engine | None
) -> dict[str, np.ndarray]:
    """:func:`answer_stats` of all prompts."""

    def work(share: list[int]) -> list[dict[str, np.ndarray]]:
        pad = bundle.tokenizer.pad_token_id or 0
        found = answer_stats(bundle.model, reference, [ids[i] for i in share], [answers[i] for i in share], pad)
        return [{k: v[row] for k, v in found.items()} for row in range(len(share))]

    rows = _shared(
        engine, [len(p) + sum(len(getattr(a, "ids", a)) for a in own) for p, own in zip(ids, answers, strict=True)], work
    )
    return {k: np.stack([r[k] for r in rows]) for k in rows[0]}


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(distributions.rankdata(a), distributions.rankdata(b))[0, 1])


def ranking(batches: Sequence[Pairs]) -> dict[str, Any]:
    """How the implicit reward ``log π/π_ref`` (without a reference ``log π``) ranks given pairs, and whether length decides.

    ``accuracy`` with its 95 % Wilson interval (a tie is one half), ``margin`` (mean and median, nats), ``accuracy, longer
    chosen`` and ``…, shorter chosen``, ``prefers longer`` beside ``labels prefer longer``.
    """
    parts = [np.stack([np.asarray(v.double().cpu()) for v in _columns(b)]) for b in batches]
    margin, longer = np.concatenate(parts, axis=1)
    right = (margin > 0) + 0.5 * (margin == 0)
    told = longer != 0
    chooses_longer = (margin * longer > 0) + 0.5 * (margin == 0)
    return {
        "pair accuracy": float(right.mean()), "pair accuracy 95 %": list(wilson(float(right.sum()), len(right))),
        "margin": float(margin.mean()), "median margin": float(np.median(margin)),
        "accuracy, longer chosen": _mean(right[longer > 0]), "accuracy, shorter chosen": _mean(right[longer < 0]),
        "prefers longer": _mean(chooses_longer[told]), "labels prefer longer": _mean((longer > 0)[told]),
    }  # fmt: skip


def _columns(b: Pairs) -> tuple[Any, Any]:
    chosen, rejected = b.chosen_logps, b.rejected_logps
    if b.ref_chosen_logps is not None and b.ref_rejected_logps is not None:
        chosen, rejected = chosen - b.ref_chosen_logps, rejected - b.ref_rejected_logps
    return chosen - rejected, b.chosen_len - b.rejected_len


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
