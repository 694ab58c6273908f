"""probe/preference-basis: planted categories, models and topics are found again.

Bugs it is meant to catch: pairs of one prompt on both sides of the split, ratings by the overall choice instead of the category,
topics mixed up, a category attributed to pairs that it speaks against.
"""

import json

import numpy as np
import pytest
from scipy import special

from metier.core import part
from metier.core.errors import UsageError
from metier.parts.probe import preference_basis as module
from metier.testing import check_part
from metier.testing.probe import tiny_probe

NAMES = [f"c{k}" for k in range(6)]
WEIGHTS = {"art": np.array([1.2, -0.9, 0.7, 0, 0, 0]), "code": np.array([-1.2, 0.9, -0.7, 0, 0, 0])}
STRENGTH = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [1.0, 2.0, 0.0]])
"""Of three models in the first three categories."""


def write(path, number=4000, topics=("art",), seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(number):
        models = rng.permutation(3)[:2]
        value = np.array([rng.normal(size=6) + np.append(STRENGTH[:, m], [0, 0, 0]) for m in models])
        topic = topics[i % len(topics)]
        order = [0, 1] if rng.random() < special.expit(np.sign(value[0] - value[1]) @ WEIGHTS[topic]) else [1, 0]
        row = {"prompt": f"p{i // 2}", "chosen": f"a{i}", "rejected": f"b{i}", "topic": topic}
        for side, k in zip(("chosen", "rejected"), order, strict=True):
            row |= {f"{n}_{side}": float(v) for n, v in zip(NAMES, value[k], strict=True)}
            row[f"model_{side}"] = f"m{models[k]}"
        rows.append(row)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("basis") / "pairs.jsonl")


def probed(where, **options):
    options = {"properties": [], "columns": NAMES, "bootstrap": 0, **options}
    return part.build("probe", {"preference-basis": {"data": where, **options}}).obj(tiny_probe())


def test_contract():
    check_part("probe/preference-basis")


def test_the_three_categories_are_found_in_order(data):
    found = probed(data, target=0.95)
    assert [c["category"] for c in found["categories"]] == ["c0", "c1", "c2"]
    for row, truth in zip(found["categories"], (1.2, -0.9, 0.7), strict=True):
        assert row["weight"] == pytest.approx(truth, abs=0.15)
    assert found["reached"]
    assert found["share"] >= 0.95
    assert found["held_out"] == 1200
    assert found["all"] == 6
    assert sum(c["attributed"] for c in found["categories"]) <= found["pairs"] * 1.5
    one = probed(data, most=1)
    assert len(one["categories"]) == 1
    assert not one["reached"]


def test_prompts_are_held_out_whole(data):
    from metier.parts.probe._preferences import pairs

    found = pairs(tiny_probe(), data, None)
    out = module._some_prompts(found, 0.3, 0)
    by_prompt = {}
    for e, o in zip(found, out, strict=True):
        by_prompt.setdefault(e.prompt, set()).add(bool(o))
    assert all(len(v) == 1 for v in by_prompt.values())
    assert 0.25 < out.mean() < 0.35


def test_ratings_have_the_planted_order(data):
    found = probed(data, model="model", bootstrap=20, target=0.95)["elo"]
    for k, name in enumerate(["c0", "c1", "c2"]):
        rows = [r for r in found if r["category"] == name]
        assert [r["model"] for r in rows] == [f"m{m}" for m in np.argsort(-STRENGTH[k])]
        assert all(r["low"] <= r["elo"] <= r["high"] for r in rows)
        assert all(not r["few"] for r in rows)
        for r in rows:
            below = STRENGTH[k][int(r["model"][1])] - STRENGTH[k].mean()
            assert r["elo"] == pytest.approx(400 / np.log(10) * _log_odds(STRENGTH[k])[int(r["model"][1])], abs=60), below


def _log_odds(strength):
    """Best Bradley-Terry rewards for the probit differences of normal values, by least squares of log-odds."""
    from scipy.stats import norm

    gap = np.subtract.outer(strength, strength) / np.sqrt(2)
    p = norm.cdf(gap)
    return (np.log(p) - np.log(1 - p)).mean(1)


def test_opposite_topics_are_one_direction(tmp_path):
    found = probed(write(tmp_path / "two.jsonl", topics=("art", "code", "art")), topic="topic", target=0.9)
    weights = {r["topic"]: r for r in found["topics"]}
    assert weights["art"]["c0"] > 0.8 > -0.8 > weights["code"]["c0"]
    assert found["explained_by_rank"][0] > 0.98
    assert len(found["singular_values"]) == 2


def test_ids_of_a_category(data):
    from metier.parts.probe._preferences import pairs

    found = probed(data, category="c1", target=0.95)
    row = next(c for c in found["categories"] if c["category"] == "c1")
    assert len(found["ids"]) == row["attributed"] > 100
    meta = {e.id: e.meta for e in pairs(tiny_probe(), data, None)}
    for i in found["ids"]:  # c1 has a negative weight: it speaks for the chosen where the chosen has less
        assert meta[i]["c1_chosen"] < meta[i]["c1_rejected"]


def test_a_category_that_was_not_chosen_is_refused(data):
    with pytest.raises(UsageError, match="chosen category"):
        probed(data, category="c5", most=2)
