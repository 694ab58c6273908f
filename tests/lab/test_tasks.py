"""Tasks with known answers: the answers are right, and a counted chain agrees with its stated entropy."""

import math
from collections import Counter

import numpy as np
import pytest

from metier.core import part
from metier.core.data.formats import examples
from metier.core.data.rows import open_rows
from metier.lab import tasks


def test_arithmetic_is_right_and_the_verifier_agrees():
    rows = tasks.arithmetic(200)
    for row in rows:
        a, sign, b = row["question"].removeprefix("What is ").removesuffix("?").split()
        assert int(row["answer"].split("#### ")[1]) == int(a) + (int(b) if sign == "+" else -int(b))
    verify = part.build("reward", "arithmetic").obj
    scores = verify(
        [r["question"] for r in rows], [[r["answer"], "#### 1000"] for r in rows], [r["answer"].split("#### ")[1] for r in rows]
    )
    assert scores[:, 0].min() == 1
    assert scores[:, 1].max() == 0


def test_the_chain_has_the_stated_entropy():
    matrix = np.array(tasks.transitions())
    values, vectors = np.linalg.eig(matrix.T)
    share = np.real(vectors[:, np.argmin(abs(values - 1))])
    share /= share.sum()
    assert tasks.stationary(tasks.transitions()) == pytest.approx(share.tolist(), abs=1e-9)
    counts = Counter(
        pair for row in tasks.markov(2000) for pair in zip(row["text"].split(), row["text"].split()[1:], strict=False)
    )
    total, starts = sum(counts.values()), Counter()
    for (a, _), n in counts.items():
        starts[a] += n
    seen = -sum(n / total * math.log(n / starts[a]) for (a, _), n in counts.items())
    assert seen == pytest.approx(tasks.entropy_rate(), rel=0.01)


def test_pairs_follow_the_gold_reward():
    rows = tasks.bradley_terry(2000)
    gaps = np.array([tasks.gold_reward(r["chosen"]) - tasks.gold_reward(r["rejected"]) for r in rows])
    for size in (2.0, 4.0):
        same = gaps[np.abs(gaps) == size]
        expected = 1 / (1 + math.exp(-size))
        assert (same > 0).mean() == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / len(same)))


@pytest.mark.parametrize(("name", "kind"), [("arithmetic", "Completion"), ("markov", "Text"), ("bradley-terry", "Preference")])
def test_tasks_are_data_for_runs(name, kind):
    found = examples(open_rows(f"lab/{name}", limit=5))
    assert {type(e).__name__ for e in found} == {kind}
    assert tasks.TASKS[name]() == tasks.TASKS[name]()
