"""The objectives by the name of their class or function: ``from metier.objectives import R3F``."""

from metier.core.part import namespace

__getattr__, __dir__ = namespace("objective")
