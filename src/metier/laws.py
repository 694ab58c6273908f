"""The laws by the name of their class or function: ``from metier.laws import Chinchilla``."""

from metier.core.part import namespace

__getattr__, __dir__ = namespace("law")
