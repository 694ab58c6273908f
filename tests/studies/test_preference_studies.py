"""What studies of preference objectives compare: equal sweeps, equal answers a step, floors, spreads, breakdowns.

Bugs it is meant to catch: a sweep that one arm does not have, choosing at fewer steps than are run, single answers read in half
batches, a satisfaction at its floor that decides, a difference without its spread, a diverged arm that nobody names.
"""

import math

import pytest

from metier.compare.study import Study
from metier.studies import constraint_pairs, dil, dpa_logic, dpo_survey, kto, preference_loss_family, pro
from metier.studies._arms import Arm, Arms, Try
from metier.studies._diverged import diverged

PLAIN = {"gold_reward": 0.5, "gold_sd": 0.5, "kl": 5.0, "degenerate": 0.0, "chosen_change": -1.0, "rejected_change": -2.0}


def arm(*runs, **figures):
    return Arm(Try("dpo"), [PLAIN | r for r in runs] or [PLAIN | figures])


@pytest.fixture
def swept(monkeypatch, tmp_path):
    """Run a study without training: the benches it makes, and for each arm the settings tried."""
    benches, arms = [], []

    def tuned(self, settings):
        benches.append(self)
        arms.append(settings)
        return Arm(settings[0], [PLAIN | {"perplexity_rise": 0.1}] * 3)

    monkeypatch.setattr(Arms, "tuned", tuned)
    monkeypatch.setattr(Arms, "base", PLAIN)
    monkeypatch.setattr(Arms, "__post_init__", lambda self: None)
    monkeypatch.setattr(pro, "candidates", lambda study: [
        {"prompt": "p", "completions": list("abcd"), "scores": [0.0, 1.0, 2.0, 3.0]}
    ])  # fmt: skip

    def run(module):
        outcome = module.run(Study(tmp_path, quick=True, quiet=True))
        return outcome, benches, arms

    return run


@pytest.mark.parametrize(
    ("module", "rates"), [(kto, (1e-4, 3e-4, 1e-3, 3e-3)), (dil, (1e-4, 3e-4, 1e-3, 3e-3)), (pro, (3e-4, 1e-3, 3e-3, 1e-2))]
)
def test_every_arm_has_the_same_sweep_at_full_length(swept, module, rates):
    _, benches, arms = swept(module)
    assert all(b.tuning == b.steps for b in benches)
    assert len({len(tried) for tried in arms}) == 1
    for tried in arms:
        lrs = sorted({t.lr for t in tried})
        assert (lrs[0], lrs[-1]) == pytest.approx((rates[0], rates[-1]))
        assert len(lrs) == 8 or lrs == list(rates)  # likelihood has only the learning rate to choose


def test_answers_of_a_step_are_as_many_for_all_arms_of_pro(swept):
    _, _, arms = swept(pro)
    answers = {"nll": 1, "dpo": 2, "pro": 0}
    seen = []
    for tried in arms:
        name = tried[0].objective if isinstance(tried[0].objective, str) else next(iter(tried[0].objective))
        each = answers[name] or {"two": 2, "four": 4}[tried[0].data]
        seen.append(each * tried[0].options.get("batch", 32))
    assert seen == [64] * 6


def test_every_program_has_three_betas(swept):
    outcome, benches, arms = swept(dpa_logic)
    assert [len(tried) for tried in arms] == [3] * 7
    assert all(b.tuning == b.steps for b in benches)
    assert outcome.checks[0].observed == [256, 210, 52, 34]


def test_programs_are_judged_in_sd_of_the_start_and_within_is_two_sided():
    arms = {name: arm(gold_reward=0.5) for name in (*dpa_logic.ARMS, "dpo")} | {"constrained": arm(gold_reward=0.6)}
    for sd, inside in ((2.0, True), (0.5, False)):
        check = dpa_logic.judged(arms, sd)[2]
        assert check.observed == pytest.approx(0.1 / sd)
        assert check.holds is inside
    arms["constrained"] = arm(gold_reward=0.4)
    assert not dpa_logic.judged(arms, 0.5)[2].holds


@pytest.mark.parametrize(("name", "answers"), [("dpo", 32), ("cpo", 32), ("kto", 64), ("bco", 64)])
def test_survey_steps_have_64_answers(name, answers):
    assert dpo_survey.batch(name) == answers


def test_survey_shows_the_spread_over_seeds():
    names = ("dpo", "cdpo", "ln-dpo", "rpo")
    run = {"gold_reward": 0.5, "length": 10.0, "chosen_change": -1.0}
    table = {(n, s): [dict(run), dict(run)] for n in names for s in dpo_survey.STRESSORS}
    table["dpo", "flipped"] = [run | {"gold_reward": 0.4}, run | {"gold_reward": 0.2}]  # loses 0.1 and 0.3
    table["ln-dpo", "long"] = [run | {"length": 7.0}, run | {"length": 7.0}]
    (noise, length, kept), doubts = dpo_survey.judged(table, names)
    assert noise.observed == "-0.2 ± 0.1"
    assert noise.holds
    assert length.observed == "-3 ± 0"
    assert not kept.holds
    assert [d.split(": ")[1].split(" ")[0] for d in doubts] == ["gold", "fall"]


def constraints(moderate, hard):
    run = {"strict_3": 0.2, "soft_3": 0.5, "strict_5": 0.2, "soft_5": 0.5, "norm_sd": 0.1}
    seen = {name: [dict(run)] for name in constraint_pairs.ARMS}
    for name, (strict, soft) in (("moderate", moderate), ("hard", hard)):
        seen[name] = [run | {"strict_5": strict, "soft_5": soft}]
    return constraint_pairs.checks(seen, 0.0)[-1]


@pytest.mark.parametrize(
    ("moderate", "hard", "holds", "by"),
    [
        ((0.006, 0.50), (0.005, 0.60), False, "soft"),
        ((0.004, 0.60), (0.005, 0.50), True, "soft"),
        ((0.06, 0.50), (0.005, 0.60), True, "strict"),
        ((0.04, 0.60), (0.06, 0.50), False, "strict"),
    ],
)
def test_hard_prompts_are_judged_by_soft_satisfaction_at_the_floor(moderate, hard, holds, by):
    check = constraints(moderate, hard)
    assert check.holds is holds
    assert check.observed.endswith(f"judged by {by}")
    assert f"strict {100 * moderate[0]:.2f} - {100 * hard[0]:.2f}" in check.observed
    assert f"soft {100 * moderate[1]:.2f} - {100 * hard[1]:.2f}" in check.observed


def test_constraint_rates_at_an_end_and_what_the_start_keeps_are_noted():
    start = {c: {"soft": 0.4, "strict": 0.1} for c in (1, 3, 5)}
    low, middle, high = constraint_pairs.RATES
    tried = {"tree": {low: 0.1, middle: 0.3, high: 0.2}, "hard": {low: 0.1, middle: 0.2, high: 0.3}, "low": {}}
    kept, ends = constraint_pairs.notes(start, tried)
    assert "3 a prompt: soft 40.0%, strict 10.0%" in kept
    assert ends.endswith(f"hard ({high:g}).")


@pytest.mark.parametrize("name", ["moderate", "hard"])
def test_constraint_rates_are_chosen_on_the_arms_own_number_of_constraints(monkeypatch, tmp_path, name):
    asked = []

    def satisfied(study, model, number, split="held-out"):
        asked.append((number, split))
        return {"strict": 0.1, "soft": 0.5, "words": 8.0}

    monkeypatch.setattr(constraint_pairs, "satisfied", satisfied)
    monkeypatch.setattr(constraint_pairs.lab, "train", lambda *a, **k: (None, {}))
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    constraint_pairs.trained(Study(tmp_path), "base", name, [row], 100, 1e-3, choosing=True)
    assert asked == [({"moderate": 3, "hard": 5}[name], "train")]


def test_diverged_arms_are_named_with_their_figures():
    arms = {
        "fine": arm(kl=49.0, degenerate=0.09), "far": arm(kl=112.0), "babble": arm(degenerate=0.5), "broken": arm(kl=math.nan),
        "mean": arm({"kl": 90.0}, {"kl": 20.0}),
    }  # fmt: skip
    (note,) = diverged(arms, "near data")
    assert "on near data" in note
    for text in ("far (KL 112, degenerate 0)", "babble (KL 5, degenerate 0.5)", "broken (KL not finite", "mean (KL 55"):
        assert text in note
    assert "fine" not in note
    assert diverged({"fine": arms["fine"]}) == []


def test_the_sheet_names_what_diverged(monkeypatch, tmp_path):
    names = (*preference_loss_family.KEEPS, *preference_loss_family.ROBUST, *preference_loss_family.SHORT, "dpo", "apo-down")
    bench = Arms.__new__(Arms)
    bench.base = PLAIN

    def kind(study, kind, how):
        extra = {"apo-down": arm(kl=112.0, degenerate=0.5)} if kind == "clean" else {}
        return bench, {n: arm() for n in names} | extra

    monkeypatch.setattr(preference_loss_family, "_kind", kind)
    monkeypatch.setattr(preference_loss_family, "_row", lambda arm, bench: {})
    notes = preference_loss_family.run(Study(tmp_path)).notes
    assert len(notes) == 1
    assert "clean data" in notes[0]
    assert "apo-down (KL 112, degenerate 0.5)" in notes[0]
