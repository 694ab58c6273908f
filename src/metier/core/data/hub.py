"""Rows from the hub, read through ``datasets``; never runs code that comes with a data set."""

import contextlib
from collections.abc import Iterator
from typing import Any

from metier.core.errors import UsageError, unknown
from metier.core.network import reachable

LOCAL = "Use a local file: data.train=rows.jsonl (one JSON object per line), a .csv, a .parquet or a folder."


def hub_rows(where: str, split: str | None, limit: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of ``org/name[:config]``, counted from 1. Without ``split``: ``train``, or the only split.

    Raises ``UsageError`` when the data set is neither cached nor reachable, or lacks the split.
    """
    data = _load(where, split)
    for i in range(len(data) if limit is None else min(limit, len(data))):
        yield i + 1, data[i]


def _load(where: str, split: str | None) -> Any:
    name, _, config = where.partition(":")
    reached = reachable()
    import datasets

    try:
        with contextlib.nullcontext() if reached else _cached_only():
            found = datasets.load_dataset(name, config or None)
    except Exception as e:  # the client's exception type differs per version, cause and transport
        why = _first_line(e) if reached else "the hub cannot be reached and the data set is not in the cache"
        raise UsageError(f"the data set cannot be loaded: {why}", where=where, hint=LOCAL) from None
    splits = [str(s) for s in found]
    wanted = split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else "")
    if wanted not in splits:
        raise unknown("split", split or "(none given)", splits, where=where)
    return found[wanted]


@contextlib.contextmanager
def _cached_only() -> Iterator[None]:
    """The hub client without network, as if ``HF_HUB_OFFLINE`` had been set before its import."""
    import datasets
    import huggingface_hub

    holders: list[Any] = [getattr(datasets, "config"), huggingface_hub.constants]  # noqa: B009 - the stubs hide it
    before = [holder.HF_HUB_OFFLINE for holder in holders]
    try:
        for holder in holders:
            holder.HF_HUB_OFFLINE = True
        yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.HF_HUB_OFFLINE = value


def _first_line(e: Exception) -> str:
    return (str(e) or type(e).__name__).splitlines()[0]
