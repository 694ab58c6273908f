"""The rewards by the name of their class or function: ``from metier.rewards import arithmetic``."""

from metier.core.part import namespace

__getattr__, __dir__ = namespace("reward")
