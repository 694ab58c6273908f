"""Merges as functions: ``metier.merges.average`` is the object of the part ``merge/average``."""

from metier.core.part import namespace

__getattr__, __dir__ = namespace("merge")
