"""Oracle of hook/ema: the recursion and its closed form in float64.

Bugs it is meant to catch: decay and 1 - decay exchanged, the missing bias correction, the ramp off by one,
half precision averages, weights not restored, a resumed average that starts again.
"""

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.errors import UsageError
from metier.testing import check_part
from metier.testing._tiny import same, tiny, weights


def started(**options):
    hook = part.build("hook", {"ema": options}).obj
    run = tiny(hook)
    run.dispatch("on_start", run.context)
    return hook, run


def history(run, steps):
    seen = [weights(run.context.model)]
    for _ in range(steps):
        run.step()
        seen.append(weights(run.context.model))
    return seen


def evaluated(run):
    """The weights an evaluation sees."""
    run.dispatch("on_eval_start", run.context)
    seen = weights(run.context.model)
    run.dispatch("on_eval_end", run.context)
    return seen


def closed_form(series, decays, start):
    """sum_i (1 - d_i) prod_{j > i} d_j w_i, plus what is left of the start."""
    total = np.zeros_like(series[0]) if start == "debias" else series[0] * np.prod(decays)
    for i, d in enumerate(decays, 1):
        total = total + (1 - d) * np.prod(decays[i:]) * series[i]
    return total / (1 - np.prod(decays)) if start == "debias" else total


@pytest.mark.parametrize("start", ["copy", "debias", "ramp"])
def test_average(start):
    _, run = started(decay=0.9, start=start)
    seen = history(run, 5)
    decays = np.array([min(0.9, (1 + t) / (10 + t)) for t in range(5)] if start == "ramp" else [0.9] * 5)
    got = evaluated(run)
    for name in seen[0]:
        series = [s[name].double().numpy() for s in seen]
        np.testing.assert_allclose(got[name].numpy(), closed_form(series, decays, start), rtol=0, atol=2e-7)


def test_contract():
    check_part("hook/ema")


def test_every_second_step():
    _, run = started(decay=0.5, every=2)
    seen = history(run, 4)
    name = next(iter(seen[0]))
    expected = 0.25 * seen[0][name] + 0.25 * seen[2][name] + 0.5 * seen[4][name]
    torch.testing.assert_close(evaluated(run)[name], expected)


def test_debias_before_the_first_step_is_the_weights():
    _, run = started(start="debias")
    assert same(evaluated(run), weights(run.context.model))


def test_the_end_is_the_average_and_a_second_evaluation_is_the_same():
    _, run = started(decay=0.8)
    history(run, 3)
    average, live = evaluated(run), weights(run.context.model)
    assert not same(average, live)
    run.dispatch("on_end", run.context)
    assert same(weights(run.context.model), average)
    assert same(evaluated(run), average)


def test_kept_but_not_used():
    _, run = started(decay=0.8, use=False)
    history(run, 2)
    live = weights(run.context.model)
    run.dispatch("on_end", run.context)
    assert same(weights(run.context.model), live)
    assert same(evaluated(run), live)


def test_averages_are_float32_for_bfloat16_weights():
    hook = part.build("hook", {"ema": {"decay": 0.999}}).obj
    run = tiny(hook)
    run.context.model.to(torch.bfloat16)
    run.dispatch("on_start", run.context)
    assert {a.dtype for a in hook.average.values()} == {torch.float32}
    before = {n: a.clone() for n, a in hook.average.items()}
    with torch.no_grad():
        for p in run.context.model.parameters():
            p.add_(0.5)
    run.dispatch("on_step", run.context)
    name = "model.norm.weight"
    # bfloat16 would round 1 + 0.0005 to 1.
    torch.testing.assert_close(hook.average[name] - before[name], torch.full_like(before[name], 0.0005), rtol=0.01, atol=0)


def test_frozen_weights_are_not_averaged_and_later_freezing_does_not_matter():
    hook = part.build("hook", {"ema": {"decay": 0.5}}).obj
    run = tiny(hook)
    params = dict(run.context.model.named_parameters())
    params["model.norm.weight"].requires_grad_(False)
    run.dispatch("on_start", run.context)
    assert set(hook.average) == set(params) - {"model.norm.weight"}
    for p in params.values():
        p.requires_grad_(False)
    run.dispatch("on_step", run.context)
    assert hook.updates == 1


def test_without_decay_the_average_is_the_weights():
    _, run = started(decay=0.0, start="debias")
    history(run, 3)
    assert same(evaluated(run), weights(run.context.model))


def test_debiased_average_of_constant_weights_is_these():
    hook = part.build("hook", {"ema": {"decay": 0.99, "start": "debias"}}).obj
    run = tiny(hook)
    run.dispatch("on_start", run.context)
    for _ in range(7):
        run.dispatch("on_step", run.context)
    got, live = evaluated(run), weights(run.context.model)
    for name, w in live.items():
        torch.testing.assert_close(got[name], w, rtol=2e-6, atol=1e-7)


def several(evaluating, *options):
    hooks = [part.build("hook", {"ema": o}).obj for o in options]
    run = tiny(hooks[0])
    run.listeners[:] = hooks
    run.dispatch = type(run.dispatch)(hooks)
    run.context.run = run.context.run.model_copy(
        update={"train": run.context.run.train.model_copy(update={"eval_every": 2 if evaluating else None})}
    )
    run.dispatch("on_start", run.context)
    return hooks, run


def test_several_averages_are_measured_and_training_goes_on_the_same():
    options = [{"decay": d, "start": "debias", "use": False, "log": True} for d in (0.5, 0.9)]
    _, plain = several(False, {"use": False})
    hooks, run = several(True, *options, {"decay": 0.2})
    assert [same(a, b) for a, b in zip(history(run, 4), history(plain, 4), strict=True)] == [True] * 5
    measured = {n: run.context.metrics[f"ema_{n}_loss"] for n in ("0.5", "0.9")}
    assert "ema_0.2_loss" not in run.context.metrics
    for hook, (name, value) in zip(hooks, measured.items(), strict=False):
        alone = tiny(part.build("hook", {"ema": {"decay": float(name), "start": "debias"}}).obj)
        alone.dispatch("on_start", alone.context)
        history(alone, 4)
        assert alone.evaluate()["eval_loss"] == pytest.approx(value, rel=1e-6)
        assert hook.updates == 4
    assert measured["0.5"] != measured["0.9"]


def test_two_used_averages_are_refused_before_training():
    _, run = several(False, {"use": False})
    run.context.run = run.context.run.model_copy(update={"hooks": ["ema", {"hook/ema": {"decay": 0.9}}]})
    hook = part.build("hook", "ema").obj
    with pytest.raises(UsageError, match="only one average"):
        hook.on_start(run.context)
    run.context.run = run.context.run.model_copy(update={"hooks": ["ema", {"ema": {"use": False}}]})
    hook.on_start(run.context)
