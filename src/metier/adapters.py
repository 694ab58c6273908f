"""Adapters as classes: ``metier.adapters.LoRA`` is the object of the part ``adapter/lora``."""

from metier.core.part import namespace

__getattr__, __dir__ = namespace("adapter")
