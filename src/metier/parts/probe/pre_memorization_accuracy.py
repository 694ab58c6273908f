"""Accuracy on training questions before their solutions are learnt by heart (Kang et al., ICML 2025, arXiv:2411.07681)."""

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np

from metier.core.batch import Tokens
from metier.core.errors import UsageError
from metier.core.part import Count, Positive, build, part
from metier.core.probing import Probe, checkpoints
from metier.parts.probe import _solutions as solutions

Array = np.ndarray


def pre_memorization(accuracy: Array, perplexity: Array, p: float) -> Array:
    """``PM [E, N]`` from accuracies and perplexities ``[E, N]`` of N examples at E checkpoints, oldest first.

    ``PM_i(e) = min(max_{e' <= e} Acc_i(e') [Ppl_i(e') > p], Acc_i(e))``; the comparison is strict.
    """
    accuracy, perplexity = np.asarray(accuracy, float), np.asarray(perplexity, float)
    if accuracy.shape != perplexity.shape or accuracy.ndim != 2:
        raise UsageError(f"accuracies {accuracy.shape} and perplexities {perplexity.shape} are not tables of one shape [E, N]")
    return np.minimum(np.maximum.accumulate(np.where(perplexity > p, accuracy, 0.0), 0), accuracy)


def calibrated(runs: Sequence[tuple[Array, Array, Array]], candidates: Sequence[float]) -> float:
    """The candidate p for which mean PM is nearest to the test accuracy, in squares over all runs and checkpoints.

    ``runs``: (accuracy ``[E, N]``, perplexity ``[E, N]``, test accuracy ``[E]``) of each.
    """

    def error(p: float) -> float:
        return sum(float(((pre_memorization(a, q, p).mean(1) - t) ** 2).sum()) for a, q, t in runs)

    return min(candidates, key=error)


def r_squared(x: Sequence[float], y: Sequence[float]) -> float:
    """R² of the best line through (x, y): the squared correlation; 0 when one of them does not vary."""
    a, b = (np.asarray(v, float) - np.mean(v) for v in (x, y))
    size = float(a @ a) * float(b @ b)
    return float(a @ b) ** 2 / size if size > 0 else 0.0


@part("probe/pre-memorization-accuracy", paper="arXiv:2411.07681", rows=(7,))
def pre_memorization_accuracy(
    probe: Probe,
    *,
    threshold: Positive = 1.106,
    samples: Count = 5,
    temperature: Positive = 0.8,
    top_p: Positive = 0.95,
    max_new_tokens: Count | None = None,
    reward: str | dict[str, dict[str, Any]] = "arithmetic",
    batch: Count = 32,
) -> dict[str, Any]:
    """Pre-memorisation accuracy PM, which predicts test accuracy, at every checkpoint that the run has kept.

    At checkpoint e, for question i with solution y_i: ``Acc_i(e)``, the share of ``samples`` answers drawn at ``temperature``
    and ``top_p`` that ``reward`` finds right (> 0), given y_i as the answer; ``Ppl_i(e) = exp(mean NLL)`` over the tokens of
    y_i and its end, the question left out. Then, with p = ``threshold``,

        PM_i(e) = min(max_{e' <= e} Acc_i(e') [Ppl_i(e') > p], Acc_i(e)),   PM(e) = mean_i PM_i(e).

    Use: train with ``train.save_every`` of an epoch and ``train.keep`` of all of them on question-answer data, then
    ``metier probe pre-memorization-accuracy RUN --on train --batches 50``. On held-out data ``accuracy`` is the test
    accuracy that PM should track. p is one number per model and style of solution: 1.106 is the paper's for GSM8K with
    Llama 3 8B, 1.200 for MATH; short solutions become predictable sooner. Calibrate it on a few runs (``calibrated`` here,
    with ``tables`` of the result, rows checkpoints and columns examples). ``examples`` holds the newest checkpoint's
    values: right answers with a low PM are brittle, and worth more data around them.

    The number of samples biases the running maximum upwards: keep it fixed. A run probed without checkpoints, or a run
    file, gives one row, in which PM knows no past. Examples in which ``reward`` finds no answer are left out. In a
    conversation the last turn counts. ``max_new_tokens``: by default twice the longest solution. Against the
    released script, whose slice begins one token late, the first token of the solution counts. On the tables released for
    GSM8K (51 checkpoints of 13 runs) the formula here gives R² = 0.94 with test accuracy, plain accuracy 0.40, and
    ``calibrated`` finds 1.105. Cost: ``samples``
    generations per example and checkpoint, ``batch`` questions of equal length at a time.
    """
    if not probe.model.can_generate() or probe.reads is not Tokens:
        raise UsageError("pre-memorization-accuracy needs a generative model trained on solutions")
    check = build("reward", reward).obj
    found = solutions.solved(probe)
    asked = solutions.with_answers(found, check)
    without = len(found) - len(asked)
    if not asked:
        return {"examples_used": 0, "without_answer": without}
    longest = max_new_tokens or 2 * max(len(a.targets) for a in asked)
    how = {"temperature": temperature, "top_p": top_p, "top_k": 0, "num_return_sequences": samples, "max_new_tokens": longest}
    steps, accuracy, perplexity = [], [], []
    with closing(checkpoints(probe)) as kept:  # type: ignore[arg-type]
        for step in kept:
            steps.append(step)
            perplexity.append(solutions.perplexities(probe, asked))
            accuracy.append(solutions.accuracies(probe, asked, check, how, batch))
    return {
        "examples_used": len(asked),
        "without_answer": without,
        "threshold": threshold,
        **_result([x.id for x in asked], steps, np.array(accuracy), np.array(perplexity), threshold),
    }


def _result(ids: Sequence[str], steps: Sequence[int | None], acc: Array, ppl: Array, p: float) -> dict[str, Any]:
    """The newest checkpoint's means, every checkpoint's, the newest values of every example, and the tables."""
    pm = pre_memorization(acc, ppl, p)
    rows = [
        {"step": s, "pm": float(m.mean()), "accuracy": float(a.mean()), "memorised": float((q <= p).mean()),
         "perplexity": float(np.exp(np.log(q).mean()))}
        for s, m, a, q in zip(steps, pm, acc, ppl, strict=True)
    ]  # fmt: skip
    return {
        **{k: v for k, v in rows[-1].items() if k != "step"}, "checkpoints": rows,
        "examples": [
            {"id": i, "pm": float(m), "accuracy": float(a), "perplexity": float(q)}
            for i, m, a, q in zip(ids, pm[-1], acc[-1], ppl[-1], strict=True)
        ],
        "tables": {"accuracy": acc.tolist(), "perplexity": ppl.tolist()},
    }  # fmt: skip
