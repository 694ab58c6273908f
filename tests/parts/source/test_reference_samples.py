"""source/reference-samples: answers of the reference beside pairs, drawn once.

Bugs it is meant to catch: samples of the trained model in later rounds, another temperature or a nucleus, too few samples,
unfinished ones, samples of the model where the run file names another reference.
"""

import numpy as np
import pytest
from _answering import (
    Made,
    build,
    check_resumes,
    losses,
    paired,
    pairs_file,
    rounds,
    rows_of,
    word_run,
)

from metier import train
from metier.core.data import rounds as kept
from metier.core.errors import UsageError
from metier.core.sample import sample
from metier.lab import preferencebench, words
from metier.testing import check_part


def test_contract():
    check_part("source/reference-samples")


def test_samples_are_added_to_the_pair():
    policy = Made(lambda p, n, c: [f"{p} sample {k}" for k in range(n)])
    (made,) = rounds(build("reference-samples", number=3), paired(5), policy)
    assert {(e.prompt, e.chosen, e.rejected, e.samples) for e in made} == {
        (f"q{i}", f"good {i}", f"bad {i}", tuple(f"q{i} sample {k}" for k in range(3))) for i in range(5)
    }
    assert [(c["temperature"], c["top_p"]) for c in policy.calls] == [(1.0, 1.0)]


def test_later_rounds_take_the_first_ones(tmp_path):
    policy = Made(lambda p, n, c: [f"call {c}"] * n, folder=tmp_path)
    source = build("reference-samples")
    (first,) = rounds(source, paired(12), policy)
    kept._write(kept.place(tmp_path, 0), first)
    later = [source.round(paired(12), policy=policy, round=i, rng=np.random.default_rng([0, i])) for i in (1, 2)]
    plain = [[(e.prompt, e.chosen, e.rejected, e.samples) for e in r] for r in (first, *later)]
    assert sorted(plain[0]) == sorted(plain[1]) == sorted(plain[2])
    assert plain[0] != plain[1] != plain[2]
    assert len(policy.calls) == 1


def test_what_did_not_end_is_drawn_again():
    def says(p, n, c):
        if p == "q0":
            return [("cut", False)] * n
        return [("cut", False), "", "ok"][:n] if c == 0 else [f"call {c}"] * n

    (made,) = rounds(build("reference-samples", number=3, tries=3), paired(4), Made(says))
    assert {e.prompt: e.samples for e in made} == {f"q{i}": ("ok", "call 1", "call 1") for i in (1, 2, 3)}


def test_when_nothing_ends_it_says_so():
    with pytest.raises(UsageError, match="only 0 of 4 prompts have 1 answers"):
        rounds(build("reference-samples"), paired(4), Made(lambda p, n, c: [("cut", False)]))


@pytest.mark.parametrize("objective", [{"typo": {"lam": 0.1}}, "xpo"], ids=["typo", "xpo"])
def test_two_rounds_resumed_in_the_second(tmp_path, objective):
    source = {"reference-samples": {"number": 2, "max_new_tokens": 24}}
    run = word_run(pairs_file(tmp_path, 16), source, objective, steps=7, batch=4)
    whole = check_resumes(run, tmp_path, stop=6)
    assert whole.status == "done"
    first, second = (rows_of(tmp_path / "whole", n) for n in (1, 2))
    key = lambda r: (r["prompt"], r["chosen"], tuple(r["samples"]))
    assert first != second
    assert sorted(map(key, first)) == sorted(map(key, second))
    assert all(len(r["samples"]) == 2 for r in first)
    if objective != "xpo":
        step = next(e for e in whole.events if e["event"] == "step")
        assert "kl" in step or "cross_entropy" in step


def test_a_named_reference_answers(tmp_path):
    """The model has random weights and would not end; the samples are words of the fine-tuned reference."""
    run = word_run(
        pairs_file(tmp_path, 8), {"reference-samples": {"number": 2, "max_new_tokens": 24}}, "xpo", steps=1, model="lab/words-120k",
        reference="lab/words-sft",
    )  # fmt: skip
    result = train(run, out=tmp_path / "run", quiet=True)
    assert np.isfinite(losses(result)).all()
    verbs = [any(w in words.VERBS for w in s.split()) for r in rows_of(tmp_path / "run", 1) for s in r["samples"]]
    assert np.mean(verbs) > 0.9


def test_the_estimate_is_unbiased(tmp_path):
    """Words of the samples have the frequencies of plain samples of the reference: mean length within four standard errors."""
    data = pairs_file(tmp_path, 40)
    run = word_run(data, {"reference-samples": {"number": 8, "max_new_tokens": 24}}, {"typo": {"lam": 0.1}}, steps=1)
    train(run, out=tmp_path / "run", quiet=True)
    rows = rows_of(tmp_path / "run", 1)
    own = np.array([np.mean([len(s.split()) for s in r["samples"]]) for r in rows])
    bundle = preferencebench.sft()
    ids = preferencebench.encode([r["prompt"] for r in rows])
    plain = sample(bundle.model, bundle.tokenizer, ids, number=32, max_new_tokens=40, seed=77)
    lengths = np.array([[len(a.text.split()) for a in row if a.ended] for row in plain], dtype=object)
    expected = np.array([np.mean(x) for x in lengths])
    spread = np.sqrt(np.mean([np.var(x) for x in lengths]) * (1 / 8 + 1 / 32) / len(rows))
    assert abs(own.mean() - expected.mean()) < 4 * spread
