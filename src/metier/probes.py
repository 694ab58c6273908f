"""The probes by the name of their class or function: ``from metier.probes import calibration``."""

from metier.core.part import namespace

__getattr__, __dir__ = namespace("probe")
