"""Decoding methods as classes: each is the object of a part of kind ``decode``."""

from metier.core.part import namespace

__getattr__, __dir__ = namespace("decode")
