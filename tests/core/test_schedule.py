import subprocess
import sys

import pytest
import torch

import metier.schedules
from metier.core import part
from metier.core.clock import Clock
from metier.core.errors import MetierError, UsageError
from metier.core.schedule import Schedule, torch_scheduler


def values(schedule, steps, tokens=0.0):
    return [schedule.at(Clock(s, steps, round(s * tokens), tokens)) for s in range(steps)]


def test_warmup_is_linear_and_its_first_update_is_not_wasted():
    got = values(Schedule(lambda clock: 1.0, warmup=4), 8)
    assert got == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])


def test_the_schedule_sees_the_run_after_the_warmup():
    seen = []
    schedule = Schedule(lambda clock: seen.append((clock.step, clock.steps, clock.tokens)) or 1.0, warmup=2)
    values(schedule, 5, tokens=10)
    assert seen == [(0, 3, 20), (0, 3, 20), (0, 3, 20), (1, 3, 30), (2, 3, 40)]


@pytest.mark.parametrize(
    ("warmup", "steps", "wanted"),
    [(0, 10, 0), (0.1, 10, 1), (0.1, 11, 2), (0.07, 100, 7), (3, 10, 3), (20, 10, 20)],
)
def test_a_fraction_is_rounded_up_and_a_count_is_kept(warmup, steps, wanted):
    assert Schedule(lambda clock: 1.0, warmup=warmup).warmup_steps(steps) == wanted


def test_a_warmup_longer_than_the_run_only_warms_up():
    assert values(Schedule(part.build("schedule", "cosine"), warmup=10), 3) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("warmup", [-0.1, 1.5])
def test_a_warmup_without_meaning_is_refused(warmup):
    with pytest.raises(UsageError, match="warmup"):
        Schedule(lambda clock: 1.0, warmup=warmup)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1])
def test_a_schedule_that_gives_no_multiplier_is_an_error(bad):
    with pytest.raises(MetierError, match="at step 2 of 5"):
        Schedule(lambda clock: bad).at(Clock(2, 5))


def test_as_a_torch_scheduler():
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [p], "lr": 2.0}], lr=1.0)
    scheduler = torch_scheduler(optimizer, metier.schedules.linear(final=0.5), steps=4, warmup=2)
    seen = []
    for _ in range(6):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([1.0, 2.0, 2.0, 1.5, 1.0, 1.0])


def test_a_torch_scheduler_can_be_saved_and_resumed():
    def make():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
        return optimizer, torch_scheduler(optimizer, part.build("schedule", "cosine"), steps=10, warmup=0.2)

    optimizer, scheduler = make()
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    again, resumed = make()
    resumed.load_state_dict(scheduler.state_dict())
    again.step()
    resumed.step()
    optimizer.step()
    scheduler.step()
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_schedules_as_functions():
    assert metier.schedules.cosine(Clock(5, 10)) == pytest.approx(0.5)
    assert metier.schedules.cosine(final=0.2)(Clock(10, 10)) == pytest.approx(0.2)
    with pytest.raises(UsageError, match="final"):
        metier.schedules.cosine(final=2.0)
    assert {"constant", "linear", "cosine", "wsd"} <= set(dir(metier.schedules))


def test_the_namespace_is_light():
    code = "import sys, metier.schedules as s; s.cosine(final=0.1); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
