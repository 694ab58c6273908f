"""One page per part, and the table of all parts."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metier import catalog
from metier.core import part, resolve
from metier.core.part import KINDS, NEEDS, Claim, Listing, Option
from metier.docsite.facts import Facts, Finding
from metier.docsite.text import about, bullets, default_text, docstring, escape, papers, table, type_text

KIND_TEXT = {
    "optimizer": "How one tensor moves. Learning rate, weight decay, clipping and groups belong to the core.",
    "schedule": "The learning rate over the run, as a multiple of the peak; warmup belongs to the core.",
    "adapter": "A small trainable module around a frozen one.",
    "objective": "A loss from scores: of tokens, pairs, lists or rollouts.",
    "source": "What is trained on, in which order: mixing, selecting, conditioning, sampling.",
    "reward": "A score for completions.",
    "model": "A change to a loaded model.",
    "merge": "Several models into one, tensor by tensor.",
    "decode": "A change to how answers are written: on the logits or on activations.",
    "hook": "Something that listens to the training loop.",
    "probe": "A measurement of a model.",
    "law": "A curve that is fitted to many runs.",
}

NAMESPACES = {"model": "model_parts", "decode": "decoders"}


def pages(facts: Facts) -> dict[str, str]:
    """``parts/index.md`` and ``parts/<kind>/<name>.md``."""
    return {"parts/index.md": _index(facts)} | {f"parts/{p.id}.md": _page(p, facts) for p in facts.parts}


def _index(facts: Facts) -> str:
    out = [
        "# Parts",
        f"{len(facts.parts)} techniques. In the terminal: `metier list`, `metier show optimizer/adamw`.",
    ]
    for kind in KINDS:
        found = [p for p in facts.parts if p.kind == kind]
        out += [f"## {kind}", KIND_TEXT[kind]]
        rows = [[f"[{p.name}]({p.id}.md)", escape(p.summary), papers(p.paper)] for p in found]
        out.append(table(["part", "what it does", "from"], rows) if rows else "*None yet.*")
    return "\n\n".join(out) + "\n"


def _page(item: Listing, facts: Facts) -> str:
    obj = part.load(item.id)
    card: part.Card = obj.__metier__
    doc = inspect.cleandoc(obj.__doc__ or "")
    sections = [
        f"# {item.name}",
        f"[Parts](../index.md) › [{item.kind}](../index.md#{item.kind})",
        docstring(doc),
        f"**From** {papers(item.paper)}",
        f"```yaml\n{_usage(item, part.options(obj))}```",
        *_options(item, obj, doc),
        *_together(card, facts.ids),
        *_claim(card.claim, facts.ids),
        *_evidence(facts.findings_of(item.id)),
        *_cost(item, facts.root),
        *_rows(item, facts),
        *_source(item, facts.root),
    ]
    return "\n\n".join(sections) + "\n"


SECTION = {
    "source": ("data:\n  source:\n", "    "),
    "model": ("transform:\n  - ", "      "),
    "hook": ("hooks:\n  - ", "      "),
}


def _usage(item: Listing, schema: Mapping[str, Option]) -> str:
    """How the part stands in a run file, with its defaults."""
    if item.kind in ("merge", "probe", "law", "reward", "decode"):
        return f"# metier show {item.id}\n{item.name}:" + _lines(schema, "  ")
    head, indent = SECTION.get(item.kind, (f"{item.kind}:\n", "  "))
    lead = head + (indent if head.endswith(":\n") else "")
    return f"{lead}{item.name}:" + _lines(schema, indent + ("  " if head.endswith(":\n") else ""))


def _lines(schema: Mapping[str, Option], indent: str) -> str:
    if not schema:
        return " {}\n"
    return "\n" + "".join(f"{indent}{o.name}: {'…' if o.required else default_text(o.default)}\n" for o in schema.values())


def _options(item: Listing, obj: Any, doc: str) -> list[str]:
    own, shared = part.options(obj), resolve.common_schema(item.kind)
    out = ["## Options", _option_table(own, doc) if own else "None of its own."]
    shared = {k: o for k, o in shared.items() if k not in own}
    if shared:
        out += [
            f"Every {item.kind} also has:",
            _option_table(shared, inspect.getdoc(resolve._common(item.kind)) or ""),
        ]
    return out


def _option_table(schema: Mapping[str, Option], doc: str) -> str:
    rows = [
        [
            f"`{o.name}`", escape(type_text(o.annotation)),
            "required" if o.required else f"`{default_text(o.default)}`", docstring(about(o.name, doc)),
        ]
        for o in schema.values()
    ]  # fmt: skip
    width = 4 if any(r[3] for r in rows) else 3
    return table(["option", "type and range", "default", "meaning"][:width], [r[:width] for r in rows])


def _together(card: part.Card, known: frozenset[str]) -> list[str]:
    lines = [f"needs **{n}**: {NEEDS[n]}" for n in sorted(card.needs)]
    lines += [f"cannot be combined with {_ref(o, known)}: {escape(why)}" for o, why in card.conflicts.items()]
    return ["## Together with others", bullets(lines)] if lines else []


def _ref(id: str, known: frozenset[str]) -> str:
    return f"[`{id}`](../{id}.md)" if id in known else f"`{id}`"


def _claim(claim: Claim | None, known: frozenset[str]) -> list[str]:
    if claim is None:
        return []
    rows = [
        ["metric", f"`{claim.metric}`, {'lower' if claim.lower_is_better else 'higher'} is better"],
        ["against", _ref(claim.against, known)],
        ["smallest effect that counts", f"{claim.minimum_effect:g}"],
        *([["the paper's figure", escape(claim.figure)]] if claim.figure else []),
    ]
    return ["## Claim", escape(claim.text) + ("" if claim.text.endswith(".") else "."), table(["", ""], rows)]


def _evidence(findings: list[Finding]) -> list[str]:
    if not findings:
        return ["## What we measured", "Nothing yet: no finding is committed."]
    out = ["## What we measured"]
    for f in findings:
        out += [
            f"{escape(f.question)} ([{f.name}](../../findings.md#{f.name.replace('/', '-')}))",
            bullets(f.sentences),
        ]
    return out


def _cost(item: Listing, root: Path) -> list[str]:
    """What a step of an optimizer takes, from the last benchmark that was kept."""
    path = root / "benchmarks" / "optimizers.json"
    if item.kind != "optimizer" or not path.is_file():
        return []
    kept = json.loads(path.read_bytes())
    row = kept["rows"].get(item.name)
    if row is None:
        return []
    cells = [
        ["optimizer state", f"{row['state_bytes_per_parameter']:.2f} bytes per parameter (fp32 AdamW: 8)"],
        ["step", f"{row['against_foreach']:.2f} × torch's foreach AdamW"],
        ["step", f"{row['of_forward_backward']:.1%} of forward and backward of {' × '.join(map(str, kept['batch']))} tokens"],
        ["slowest step", f"{row['worst_over_median']:.2f} × the median"],
    ]
    where = f"Measured on the CPU with `benchmarks/optimizers.py`, {kept['model']} ({kept['parameters'] / 1e6:.2f} M parameters)."
    return ["## Cost", table(["", ""], cells), where]


def _rows(item: Listing, facts: Facts) -> list[str]:
    named = {s["row"] for s in facts.statuses if item.id in s["parts"]} | set(item.rows)
    lines = [f"[{n}. {escape(catalog.row(n).title)}](../../rows/{n}.md)" for n in sorted(named)]
    return ["## In the reading list", bullets(lines)] if lines else []


def _source(item: Listing, root: Path) -> list[str]:
    path = Path(item.path)
    shown = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
    code = path.read_text(encoding="utf-8")
    stem = path.stem
    test = f"`tests/parts/{item.kind}/test_{stem}.py`"
    body = "\n".join(f"    {line}".rstrip() for line in ("```python\n" + code + "```").splitlines())
    space = NAMESPACES.get(item.kind, f"{item.kind}s")
    how = f"`from metier import {space}`, then `{space}.{item.object}`. Its oracle: {test}."
    return ["## Source { data-search-exclude }", how, f'??? quote "{shown}"\n\n{body}']
