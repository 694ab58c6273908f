"""The model parts by the name of their class or function: ``from metier.model_parts import qk_norm``."""

from metier.core.part import namespace

__getattr__, __dir__ = namespace("model")
