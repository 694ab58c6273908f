"""The hooks by the name of their class or function: ``from metier.hooks import EMA``."""

from metier.core.part import namespace

__getattr__, __dir__ = namespace("hook")
