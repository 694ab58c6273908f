"""Formats of raw rows: recognise one, convert its rows to typed examples, report every bad row at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from metier.core.data import values
from metier.core.data.examples import (
    BadRow,
    Chat,
    Completion,
    Crossed,
    Example,
    Judged,
    Labelled,
    Message,
    Preference,
    Prompt,
    Prompted,
    Ranked,
    Text,
)
from metier.core.data.readers import Problems
from metier.core.data.rows import Rows
from metier.core.errors import UsageError, nearest, unknown

__all__ = [
    "FORMATS", "BadRow", "Chat", "Completion", "Crossed", "Example", "Format", "Judged", "Labelled", "Message",
    "Preference", "Prompt", "Prompted", "Ranked", "Text", "convert", "detect", "examples", "expand", "lookup",
]  # fmt: skip

Row = Mapping[str, Any]
LOOK = 50
"""Rows looked at to recognise a format."""


@dataclass(frozen=True)
class Format:
    """A named shape of rows.

    ``needs`` are the keys a row must have, ``takes`` those it may have; others go to the example's ``meta``.
    ``convert`` gives the examples of one row: one, except for formats that pair several answers; it raises
    ``BadRow``.
    """

    name: str
    summary: str
    needs: tuple[str, ...]
    convert: Callable[[Row], list[Example]]
    takes: tuple[str, ...] = ()


def _text(row: Row) -> list[Example]:
    return [Text(values.string(values.need(row, "text"), "text"))]


def _messages(row: Row) -> list[Example]:
    return [Chat(values.conversation(values.need(row, "messages"), "messages"))]


def _sharegpt(row: Row) -> list[Example]:
    found = values.conversation(values.need(row, "conversations"), "conversations")
    system = row.get("system")
    if system:
        if found[0].role == "system":
            raise BadRow("both 'system' and the conversation give a system message")
        found = (Message("system", values.string(system, "system")), *found)
    return [Chat(found)]


def _alpaca(row: Row) -> list[Example]:
    prompt = values.string(values.need(row, "instruction"), "instruction")
    if row.get("input"):
        prompt += "\n\n" + values.string(row["input"], "input")
    output = values.string(values.need(row, "output"), "output")
    if row.get("system"):
        system = values.string(row["system"], "system")
        return [Completion((Message("system", system), Message("user", prompt)), output)]
    return [Completion(prompt, output)]


def _prompt_completion(row: Row) -> list[Example]:
    prompt = values.prompt(values.need(row, "prompt"))
    return [Completion(prompt, values.answer(values.need(row, "completion"), "completion"))]


def _question_answer(row: Row) -> list[Example]:
    """The answer stays in ``meta`` too: it is the right one, also where only the question is used as a prompt."""
    question = values.string(values.need(row, "question"), "question")
    answer = values.string(values.need(row, "answer"), "answer")
    return [Completion(question, answer, meta={"answer": answer})]


def _preference(row: Row) -> list[Example]:
    prompt, chosen, rejected = (values.need(row, k) for k in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list | tuple) and len(chosen) > 1:  # the conversations repeat the prompt
        return _preference_implicit(row)
    return [_pair(row, values.prompt(prompt), values.answer(chosen, "chosen"), values.answer(rejected, "rejected"))]


def _preference_implicit(row: Row) -> list[Example]:
    return [_pair(row, *values.split_prompt(values.need(row, "chosen"), values.need(row, "rejected")))]


def _pair(row: Row, prompt: values.Prompt, chosen: str, rejected: str) -> Preference:
    if chosen.strip() == rejected.strip():
        raise BadRow("chosen and rejected are equal")
    samples = row.get("samples") or ()
    if not isinstance(samples, list | tuple):
        raise BadRow(f"samples is {values.kind(samples)}, expected a list of answers")
    return Preference(
        prompt, chosen, rejected, _margin(row), tuple(values.answer(x, f"samples[{i}]") for i, x in enumerate(samples))
    )


def _margin(row: Row) -> float | None:
    if row.get("margin") is not None:
        return values.number(row["margin"], "margin")
    if row.get("score_chosen") is None or row.get("score_rejected") is None:
        return None
    return values.number(row["score_chosen"], "score_chosen") - values.number(row["score_rejected"], "score_rejected")


def _unpaired(row: Row) -> list[Example]:
    prompt = values.prompt(values.need(row, "prompt"))
    completion = values.answer(values.need(row, "completion"), "completion")
    return [Judged(prompt, completion, values.flag(values.need(row, "label"), "label"))]


def _ranked(row: Row) -> list[Example]:
    prompt = values.prompt(values.need(row, "prompt"))
    completions, scores = values.need(row, "completions"), values.need(row, "scores")
    for name, value in (("completions", completions), ("scores", scores)):
        if not isinstance(value, list | tuple):
            raise BadRow(f"{name} is {values.kind(value)}, expected a list")
    if len(completions) != len(scores):
        raise BadRow(f"{len(completions)} completions but {len(scores)} scores")
    if len(completions) < 2:
        raise BadRow(f"{len(completions)} completion(s), expected at least 2")
    texts = tuple(values.answer(c, f"completions[{i}]") for i, c in enumerate(completions))
    marks = row.get("unfinished") or ()
    if not isinstance(marks, list | tuple) or len(marks) not in (0, len(texts)):
        raise BadRow(f"unfinished is no list of {len(texts)} marks")
    unfinished = tuple(values.flag(m, f"unfinished[{i}]") for i, m in enumerate(marks))
    return [Ranked(prompt, texts, tuple(values.number(s, f"scores[{i}]") for i, s in enumerate(scores)), unfinished)]


def _prompts(row: Row) -> list[Example]:
    return [Prompted(values.prompt(values.need(row, "prompt")))]


def _crossed(row: Row) -> list[Example]:
    prompts, completions = values.need(row, "prompts"), values.need(row, "completions")
    for name, value in (("prompts", prompts), ("completions", completions)):
        if not isinstance(value, list | tuple):
            raise BadRow(f"{name} is {values.kind(value)}, expected a list")
    if len(prompts) != len(completions) or len(prompts) < 2:
        raise BadRow(f"{len(prompts)} prompts and {len(completions)} completions, expected as many, and at least 2")
    texts = tuple(values.answer(c, f"completions[{i}]") for i, c in enumerate(completions))
    if len(set(texts)) < len(texts):
        raise BadRow("two completions are equal")
    return [Crossed(tuple(map(values.prompt, prompts)), texts)]


def _classification(row: Row) -> list[Example]:
    pair = row.get("pair")
    text = values.string(values.need(row, "text"), "text")
    label = values.class_label(values.need(row, "label"))
    return [Labelled(text, None if pair is None else values.string(pair, "pair"), label)]


def _solutions(row: Row) -> dict[str, Mapping[str, Any]]:
    return {k: v for k, v in row.items() if isinstance(v, Mapping) and {"is_correct", "solution"} <= set(v)}


def _graded_solutions(row: Row) -> list[Example]:
    """Every correct solution against one incorrect one, taken in turn; none when all agree."""
    question = values.string(values.need(row, "question"), "question")
    found = _solutions(row)
    if len(found) < 2:
        raise BadRow(f"{len(found)} graded solutions, expected at least 2 keys with is_correct and solution")
    graded = [
        (values.flag(v["is_correct"], f"{k}.is_correct"), values.string(v["solution"], f"{k}.solution"))
        for k, v in found.items()
    ]  # fmt: skip
    right = list(dict.fromkeys(s for ok, s in graded if ok))
    wrong = list(dict.fromkeys(s for ok, s in graded if not ok and s not in right))
    return [Preference(question, s, wrong[i % len(wrong)]) for i, s in enumerate(right)] if wrong else []


SCORES = ("margin", "score_chosen", "score_rejected", "samples")

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("text", "plain text; every token carries loss", ("text",), _text),
        Format("messages", "conversations of {role, content} turns", ("messages",), _messages),
        Format("sharegpt", "conversations of {from, value} turns", ("conversations",),
               _sharegpt, ("system",)),
        Format("alpaca", "instruction, optional input, output", ("instruction", "output"),
               _alpaca, ("input", "system")),
        Format("prompt-completion", "a prompt and its completion", ("prompt", "completion"),
               _prompt_completion),
        Format("preference", "a prompt, a better and a worse answer", ("prompt", "chosen", "rejected"),
               _preference, SCORES),
        Format("preference-implicit", "two conversations that begin with the same prompt",
               ("chosen", "rejected"), _preference_implicit, SCORES),
        Format("unpaired", "a prompt, one answer, and whether it is good", ("prompt", "completion", "label"),
               _unpaired),
        Format("ranked", "a prompt and several answers with scores", ("prompt", "completions", "scores"),
               _ranked, ("unfinished",)),
        Format("prompts", "prompts that a source lets the model answer", ("prompt",), _prompts),
        Format("crossed", "prompts and the answer given to each, scored in all combinations", ("prompts", "completions"),
               _crossed),
        Format("classification", "a text (or a pair) and its class", ("text", "label"),
               _classification, ("pair",)),
        Format("question-answer", "a question and its answer", ("question", "answer"), _question_answer),
        Format("graded-solutions", "a question and solutions marked right or wrong", ("question",),
               _graded_solutions),
    )
}  # fmt: skip


def lookup(name: str) -> Format:
    """The format called ``name``; ``UsageError`` with the nearest otherwise."""
    if name not in FORMATS:
        raise unknown("format", name, FORMATS, where="data.format")
    return FORMATS[name]


def detect(rows: Rows) -> tuple[str, str]:
    """Name of the format and a sentence that says why, from up to 50 rows spread over the data.

    Raises ``UsageError`` when no format or more than one fits, with the keys seen and the nearest format.
    """
    stride = max(1, len(rows) // LOOK)
    sample = [rows[i] for i in range(0, len(rows), stride)][:LOOK]
    seen: dict[str, int] = {}
    for row in sample:
        for key in (k for k, v in row.items() if v is not None):
            seen[key] = seen.get(key, 0) + 1
    usual = {k for k, n in seen.items() if 2 * n >= len(sample)}  # a few bad rows must not hide the format
    fitting = _fitting(usual, sample)
    if len(fitting) == 1:
        return fitting[0], f"{rows.name}: format {fitting[0]} ({FORMATS[fitting[0]].summary}), from the keys {_list(usual)}"
    where = rows.where(0) if len(rows) else rows.name
    if fitting:
        raise UsageError(
            f"the rows fit {' and '.join(fitting)}: keys {_list(usual)}", where=where,
            hint="Say which: " + " or ".join(f"format: {name}" for name in fitting),
        )  # fmt: skip
    raise UsageError(
        f"no format fits rows with the keys {_list(set(seen)) or '(none)'}",
        where=where,
        hint=_closest(set(seen)),
    )


def _fitting(keys: set[str], sample: Sequence[Row]) -> list[str]:
    if "question" in keys and "answer" not in keys:
        graded = sum(len(_solutions(row)) >= 2 for row in sample)
        return ["graded-solutions"] if 2 * graded >= len(sample) else []
    found = [f for f in FORMATS.values() if f.name != "graded-solutions" and set(f.needs) <= keys]
    # a format whose needs are all part of another fitting one's is only the less specific reading
    return [f.name for f in found if not any(set(f.needs) < set(g.needs) for g in found)]


def _list(keys: set[str]) -> str:
    shown = sorted(keys)
    return ", ".join(shown[:12]) + (f", … ({len(shown)})" if len(shown) > 12 else "")


def _closest(keys: set[str]) -> str:
    """The format with the smallest share of missing keys, and the mapping that would make it fit."""

    def renames(f: Format) -> dict[str, str | None]:
        return {k: nearest(k, sorted(keys - set(f.needs))) for k in f.needs if k not in keys}

    def cost(f: Format) -> float:
        return sum(0.6 if theirs else 1.0 for theirs in renames(f).values()) / len(f.needs)

    best = min((f for f in FORMATS.values() if f.name != "graded-solutions"), key=cost)
    pairs = [f"{expected}: {theirs or '…'}" for expected, theirs in renames(best).items()]
    return (
        f"Nearest format: {best.name}, which needs {', '.join(best.needs)}. If your keys have other names: "
        f"columns: {{{', '.join(pairs)}}}"
    )


def expand(row: Row, format: str, *, id: str = "") -> list[Example]:
    """All examples of one row (``BadRow`` when it is unusable); none where it has nothing to compare."""
    chosen = lookup(format)
    if not isinstance(row, Mapping):
        raise BadRow(f"not an object but {values.kind(row)}")
    found = chosen.convert(row)
    used = {*chosen.needs, *chosen.takes, *(_solutions(row) if format == "graded-solutions" else ())}
    meta = {k: v for k, v in row.items() if k not in used}
    return [replace(e, id=id if i == 0 else f"{id}+{i}", meta={**meta, **e.meta}) for i, e in enumerate(found)]


def convert(row: Row, format: str, *, id: str = "") -> Example:
    """The example of one row; the first where the format makes several. Raises ``BadRow`` with the reason."""
    found = expand(row, format, id=id)
    if not found:
        raise BadRow("all solutions are right, or all are wrong: there is nothing to compare")
    return found[0]


def examples(
    rows: Rows,
    format: str = "auto",
    notice: Callable[[str], None] = lambda text: None,
    limit_errors: int = 10,
    drop: bool = False,
) -> list[Example]:
    """All examples of ``rows``; one ``UsageError`` lists up to ``limit_errors`` bad rows, or with ``drop`` a notice counts them.

    ``notice`` is told what was detected, how the rows were read, and how many rows give nothing.
    """
    for text in rows.notices:
        notice(text)
    if format == "auto":
        format, sentence = detect(rows)
        notice(sentence)
    lookup(format)
    problems, found, barren = Problems(limit_errors), [], 0
    for i in range(len(rows)):
        try:
            made = expand(rows[i], format, id=rows.id(i))
        except BadRow as e:
            problems.add(rows.where(i), str(e))
            continue
        found += made
        barren += not made
    if problems.total and drop and found:
        notice(problems.sentence(rows.name, of=len(rows)))
    elif problems.total:
        raise problems.error(f"{rows.name} as {format}", of=len(rows))
    if barren:
        notice(f"{rows.name}: {barren} of {len(rows)} rows have no pair to compare and are left out")
    if not found:
        raise UsageError("no row gives an example", where=rows.name)
    return found
