"""Arms of preference studies: what is chosen, what is kept, how arms are compared; and pieces of the studies that use them.

Bugs it is meant to catch: the worst setting chosen, a setting chosen by what the final figures are of, a limit of KL or a failed
run ignored, results of other data or settings read back, ends of sweeps kept quiet, unpaired differences, a population with other marginals than stated, a loss missing from the sheet.
"""

import math

import pytest
import torch

from metier.compare.study import Study
from metier.core import part
from metier.lab import preferencebench, tabular, wordpairs, words
from metier.studies import _arms, dil, exmate_gradient_analysis, ln_dpo, preference_loss_family, refdpo, typo_loss
from metier.studies._arms import Arm, Arms, Try, fresh, gap, tries

ROWS = [{"prompt": "praise fox today ?", "chosen": "fox is kind", "rejected": "fox is dull"}]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Arms whose runs are faked; ``bench.ran`` lists them, ``bench.seen`` what was measured on."""
    made = Arms(Study(tmp_path), {"clean": ROWS, "other": ROWS * 2}, prompts=["praise fox today ?"], held_out=ROWS)
    made.ran, made.seen = [], []

    def train(objective, data, *, lr, steps, seed, folder, **options):
        made.ran.append((objective, lr, steps, seed))
        if lr > 0.1:
            from metier.core.guards import NonFiniteError

            raise NonFiniteError({"text": "loss is nan"})
        return (lr, seed), {"loss": 1.0, "steps": steps}

    def measure(tuned, reference, prompts, *, samples, seed=0):
        made.seen.append((list(prompts), seed))
        return {"gold_reward": 10 * tuned[0] + tuned[1] / 1000, "kl": 1000 * tuned[0]}

    monkeypatch.setattr(preferencebench, "train", train)
    monkeypatch.setattr(preferencebench, "sft", lambda: None)
    monkeypatch.setattr(preferencebench, "measure", measure)
    monkeypatch.setattr(preferencebench, "measure_pairs", lambda tuned, reference, rows: {"pairs": len(rows)})
    return made


def test_the_best_setting_is_trained_with_fresh_seeds(bench):
    arm = bench.tuned(tries(["dpo"], [0.01, 0.03, 0.001]))
    assert arm.chosen.lr == 0.03
    assert [t["lr"] for t in arm.tried] == [0.01, 0.03, 0.001]
    assert bench.ran[:3] == [("dpo", lr, 50, _arms.TUNING_SEED) for lr in (0.01, 0.03, 0.001)]
    assert bench.ran[3:] == [("dpo", 0.03, 100, seed) for seed in range(3)]
    assert arm.mean() == pytest.approx(0.301)
    assert arm.values("pairs").tolist() == [1, 1, 1]


def test_settings_are_chosen_on_other_prompts_with_another_sampling_seed(bench):
    bench.tuned(tries(["dpo"], [0.01, 0.03]))
    choosing, final = bench.seen[:2], bench.seen[2:]
    assert choosing == [(bench.tuning_prompts, _arms.TUNING_SEED)] * 2
    assert final == [(["praise fox today ?"], 0)] * 3
    assert not set(bench.tuning_prompts) & set(bench.prompts)
    with pytest.raises(ValueError, match="1 prompts"):
        Arms(bench.study, {"clean": ROWS}, prompts=["a ?"], held_out=ROWS, tuning_prompts=["praise fox today ?"])


def test_what_is_kept_of_choosing_is_never_a_final_figure(bench):
    """Neither the other way round, nor for other prompts to choose on."""
    setting = Try("dpo", 0.01)
    for choosing in (True, False, True, False):
        bench.figures(setting, 0, 5, choosing=choosing)
    assert len(bench.ran) == 2
    others = Arms(bench.study, bench.data, prompts=bench.prompts, held_out=ROWS, tuning_prompts=["review owl today ?"])
    others.figures(setting, 0, 5)
    assert len(bench.ran) == 2
    others.figures(setting, 0, 5, choosing=True)
    assert len(bench.ran) == 3
    Arms(bench.study, bench.data, prompts=bench.prompts, held_out=ROWS, more=lambda a, b: {"x": 1.0}).figures(setting, 0, 5)
    assert len(bench.ran) == 4


@pytest.mark.parametrize("split", ["held-out", "shifted"])
def test_prompts_to_choose_on_are_many_and_different(split):
    final = words.prompts(128, "measured", split=split)
    held_out = wordpairs.pairs(1000, "measured", split="held-out")
    found = fresh(final, held_out, split)
    assert len(set(found)) == len(found) == 128
    assert not set(found) & ({*final} | {r["prompt"] for r in held_out})


def test_every_number_at_an_end_of_its_sweep_is_told(bench):
    beside = [{"combined": {"losses": [{"dpo": {"beta": 0.1}}, "nll"], "weights": [1.0, w]}} for w in (0.1, 0.3, 1.0)]
    arm = bench.tuned(tries(beside, [0.01, 0.03, 0.001]))
    assert arm.ends == ["lr = 0.03 (largest)", "combined.weights.1 = 0.1 (smallest)"]
    assert "some: lr = 0.03 (largest), combined.weights.1 = 0.1 (smallest)" in bench.notes(some=arm, other=arm)[0]
    inside = bench.tuned(tries(["dpo"], [0.01, 0.03, 1.0]))
    assert inside.ends == []
    assert bench.notes(inside=inside) == []
    assert bench.fixed(Try("dpo")).ends == bench.tuned([Try("dpo")]).ends == []


def test_further_settings_are_tried_around_the_best(bench):
    objectives = [{"dpo": {"beta": b}} for b in refdpo.WIDE]
    arm = refdpo.tuned(bench, objectives, data="other")
    assert len(arm.tried) == 10
    assert [t["lr"] for t in arm.tried[-2:]] == [3e-4, 3e-3]
    assert arm.chosen == Try(objectives[0], 3e-3, "other")


def test_the_penalty_is_weighed_with_its_coefficient():
    runs = [{"penalty_term": 0.2, "likelihood_term": 2.0}]
    beside = exmate_gradient_analysis.beside_dpo({"exmate": {"lam": 0.5}}, 0.3)
    for objective in ({"exmate": {"lam": 0.5}}, beside):
        assert exmate_gradient_analysis.penalty_share(Arm(Try(objective), runs)) == pytest.approx(0.05)


def test_runs_that_fail_or_go_too_far_are_not_chosen(bench):
    assert bench.tuned(tries(["dpo"], [1.0, 0.001, 0.03])).chosen.lr == 0.03
    bench.most_kl = 15.0
    assert bench.tuned(tries(["dpo"], [1.0, 0.001, 0.01, 0.03])).chosen.lr == 0.01
    bench.most_kl = 0.5
    assert bench.tuned(tries(["dpo"], [0.03, 0.001, 0.01])).chosen.lr == 0.001
    failed = bench.fixed(Try("dpo", 1.0))
    assert math.isnan(failed.mean())
    assert math.isnan(bench.fixed(Try("dpo", 1.0)).mean())  # read back


def test_results_are_kept_by_setting_seed_length_and_data(bench):
    first = bench.figures(Try("dpo", 0.01), 0, 5)
    assert bench.figures(Try("dpo", 0.01), 0, 5) == first
    assert len(bench.ran) == 1
    others = [Try("dpo", 0.02), Try("ipo", 0.01), Try("dpo", 0.01, "other"), Try("dpo", 0.01, options={"batch": 8})]
    for setting in others:
        bench.figures(setting, 0, 5)
    bench.figures(Try("dpo", 0.01), 1, 5)
    bench.figures(Try("dpo", 0.01), 0, 6)
    assert len(bench.ran) == 7
    elsewhere = Arms(bench.study, {"clean": ROWS}, prompts=["review fox today ?"], held_out=ROWS)
    elsewhere.figures(Try("dpo", 0.01), 0, 5)
    assert len(bench.ran) == 8
    longer = Arms(bench.study, {"clean": ROWS * 2}, prompts=bench.prompts, held_out=ROWS)
    longer.figures(Try("dpo", 0.01), 0, 5)
    assert len(bench.ran) == 9


def test_gaps_are_paired_by_seed():
    a, b = (Arm(Try("dpo"), [{"gold_reward": x} for x in values]) for values in ((1.0, 2.0, 6.0), (0.0, 2.0, 4.0)))
    mean, error = gap(a, b, unit=2.0)
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx(0.5 / math.sqrt(3))
    assert math.isnan(gap(a, b, "length")[0])


def test_expected_best_is_that_of_all_subsets():
    assert ln_dpo.estimator().holds
    assert ln_dpo.expected_best([3.0, 1.0]) == [2.0, 3.0]


def test_coupled_pairs_have_the_stated_marginals():
    p, q = (
        torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(i)).mul(0.7).softmax(1) for i in (0, 1)
    )
    pairs = dil.coupled(p, q)
    torch.testing.assert_close(pairs.sum(2), p, rtol=0, atol=1e-9)
    torch.testing.assert_close(pairs.sum(1), q, rtol=0, atol=1e-9)
    assert (pairs.diagonal(dim1=1, dim2=2) == 0).all()


def test_rounded_probabilities_are_drawn_exactly():
    logp = typo_loss.rounded(tabular.random_bench(prompts=6, answers=4, seed=2).reference)
    counts = logp.exp() * tabular.DRAWS
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-9)
    torch.testing.assert_close(logp.exp().sum(1), torch.ones(6, dtype=torch.float64))


def test_the_sheet_has_every_loss_on_pairs():
    from metier.core.batch import Pairs
    from metier.core.lossmodule import batch_type

    inside = set(preference_loss_family.PARTS)
    other = {"refdpo", "spa", "xpo"}  # dpo and its relatives in other clothes; labels or answers of the model's own
    for item in part.listing():
        if item.kind != "objective" or any(o.required for o in part.options(part.load(item.id)).values()):
            continue
        obj = part.build("objective", item.name).obj
        if batch_type(obj) is Pairs:
            assert item.id in inside or item.name in other, f"{item.id} is missing from the sheet of preference losses"
