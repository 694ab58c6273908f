"""Errors that people read: what is wrong, where, and the nearest valid thing."""

import difflib
from collections.abc import Iterable


class MetierError(Exception):
    """Something failed while working. The command line prints the message and exits with ``exit_code``."""

    exit_code = 1


class UsageError(MetierError):
    """The request itself is wrong (unknown name, bad value, missing file); nothing was started.

    ``where`` is the place to look, e.g. ``run.yaml:5 optimizer.lion.beta3`` or ``train.jsonl row 17``;
    ``hint`` is the nearest valid thing or the command that shows more.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__("\n  ".join(filter(None, [f"{where}: {what}" if where else what, hint])))


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name closest to ``name``, or ``None`` when nothing is close."""
    found = difflib.get_close_matches(name.lower(), {v.lower(): v for v in valid}, n=1, cutoff=0.5)
    return next((v for v in valid if v.lower() == found[0]), None) if found else None


def unknown(what: str, name: str, valid: Iterable[str], *, where: str | None = None, more: str = "") -> UsageError:
    """A ``UsageError`` for an unknown ``name``, with the nearest valid one and the valid names when few."""
    valid = sorted(valid)
    close = nearest(name, valid)
    listed = f"{what} takes {', '.join(valid)}." if 0 < len(valid) <= 12 else ""
    hint = " ".join(filter(None, [listed, f"Did you mean {close!r}?" if close else "", more]))
    return UsageError(f"unknown {what} {name!r}", where=where, hint=hint or None)
