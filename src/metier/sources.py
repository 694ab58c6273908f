"""The sources by the name of their class or function: ``from metier.sources import Mix``."""

from metier.core.part import namespace

__getattr__, __dir__ = namespace("source")
