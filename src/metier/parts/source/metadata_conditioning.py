"""MeCo: metadata conditioning, then cooldown (arXiv:2501.01956, section 2)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from metier.core.data.formats import Text
from metier.core.errors import UsageError, unknown
from metier.core.part import Count, Fraction, part


@part("source/metadata-conditioning", paper="arXiv:2501.01956", rows=(26,), needs=("metadata",))
class MetadataConditioning:
    """Put a document's metadata in front of it, without loss, for the first part of the run; then nothing.

    While ``progress < until`` a ``Text`` gets the filled template as its ``context``, which carries no loss;
    afterwards it is given as it is (the cooldown). Weights, moments and schedule carry on.

    ``field`` names the entry of an example's ``meta``; ``show`` is the whole value or its domain
    (``en.wikipedia.org`` of a URL, the first folder of a path); ``max_chars`` keeps metadata from outweighing
    short documents.
    """

    def __init__(
        self,
        *,
        field: str = "path",
        template: str = "URL: {}\n\n",
        show: Literal["whole", "domain"] = "whole",
        until: Fraction = 0.9,
        max_chars: Count = 200,
        missing: Literal["error", "plain"] = "error",
        shuffle: bool = True,
    ) -> None:
        if template.count("{}") != 1:
            raise UsageError(f"template = {template!r}: must hold {{}} once", where="source/metadata-conditioning.template")
        self.field, self.template, self.show, self.until = field, template, show, until
        self.max_chars, self.missing, self.shuffle = max_chars, missing, shuffle

    def stream(
        self,
        inputs: Mapping[str, Sequence[Any]],
        *,
        epoch: int,
        rng: np.random.Generator,
        progress: Callable[[], float],
    ) -> Iterator[Any]:
        """Every example of every input once; ``progress()`` is the fraction of the run done when it is asked
        for."""
        places = [(name, i) for name, rows in inputs.items() for i in range(len(rows))]
        order = rng.permutation(len(places)) if self.shuffle else range(len(places))
        for k in order:
            name, i = places[int(k)]
            example = inputs[name][i]
            yield self.condition(example) if progress() < self.until else example

    def condition(self, example: Any) -> Any:
        """The example behind its metadata. Raises ``UsageError`` for another kind of example or missing
        metadata."""
        if not isinstance(example, Text):
            kind = type(example).__name__
            raise UsageError(f"{example.id}: metadata conditioning reads plain text, not {kind}", where="data.source")
        value = str(example.meta.get(self.field) or "").strip()
        if not value:
            if self.missing == "plain":
                return example
            raise unknown(
                f"metadata of {example.id}:", self.field, example.meta,
                where="source/metadata-conditioning.field",
                more="missing: plain lets such documents through as they are.",
            )  # fmt: skip
        shown = (_domain(value) if self.show == "domain" else value)[: self.max_chars]
        return replace(example, context=self.template.replace("{}", shown))


def _domain(value: str) -> str:
    """``https://en.wikipedia.org/wiki/X`` -> ``en.wikipedia.org``; ``lib/json/decoder.py`` -> ``lib``."""
    return urlsplit(value).hostname or value.lstrip("./").split("/")[0]
