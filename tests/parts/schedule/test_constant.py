"""Oracle of schedule/constant."""

from metier.core import part
from metier.core.clock import Clock
from metier.core.schedule import Schedule


def test_is_the_peak_at_every_step():
    schedule = Schedule(part.build("schedule", "constant"))
    assert [schedule.at(Clock(s, 7)) for s in range(8)] == [1.0] * 8
