"""Tables of what objectives are, from their records when the site is built: a guide asks by a line ``{{ name }}``."""

import re
from collections.abc import Callable

from metier.core import choose, taxonomy
from metier.core.errors import MetierError
from metier.docsite.facts import Facts
from metier.docsite.text import escape, table

ASKED = re.compile(r"^\{\{ ([a-z]+) \}\}$", re.M)


def filled(text: str, facts: Facts, up: str = "../") -> str:
    """A guide with its tables put in; ``up`` leads to the root of the site. Raises ``MetierError`` for an unknown table."""

    def made(m: re.Match[str]) -> str:
        if m[1] not in TABLES:
            raise MetierError(f"a guide asks for the table {m[1]!r}; there are {', '.join(TABLES)}")
        return TABLES[m[1]](facts, up)

    return ASKED.sub(made, text)


def _known(facts: Facts) -> dict[str, taxonomy.Traits]:
    return {id: t for id, t in taxonomy.described().items() if id in facts.ids}


def _link(id: str, up: str) -> str:
    return f"[{id.split('/')[1]}]({up}parts/{id}.md)"


def records(facts: Facts, up: str) -> str:
    """The thirteen columns of every objective."""
    columns = taxonomy.columns()
    rows = [[_link(id, up), *(getattr(t, c) for c in columns)] for id, t in _known(facts).items()]
    return table(["objective", *columns], rows)


def fields(facts: Facts, up: str) -> str:
    """The columns with their values, and how each is known."""
    rows = []
    for name, values in taxonomy.FIELDS.items():
        meaning = "; ".join(f"`{v}`: {escape(text)}" for v, text in values.items())
        rows.append([f"`{name}`", meaning, "judged" if name in taxonomy.JUDGED else "computed"])
    return table(["column", "values", "how known"], rows)


def reasons(facts: Facts, up: str) -> str:
    """Cells that are not the usual ones and no loss can show, with the reason that the objective's file gives."""
    rows = [
        [_link(id, up), f"`{f}`: {escape(getattr(t, f))}", escape(why)]
        for id, t in _known(facts).items()
        for f, why in t.reasons.items()
    ]
    return table(["objective", "cell", "because"], rows)


def places(facts: Facts, up: str) -> str:
    """The tree of tags with what is there; bold is what a part was made for."""
    known = _known(facts)
    rows = []
    for tag, ids in choose.places(known).items():
        shown = [
            f"**{_link(i, up)}**" if i not in known or tag in known[i].declared else _link(i, up) for i in ids if i in facts.ids
        ]
        rows.append([f"`{tag}`", escape(taxonomy.TAGS[tag]), ", ".join(shown) or "nothing yet"])
    return table(["place", "what changes there", "parts"], rows)


def remedies(facts: Facts, up: str) -> str:
    """Questions of ``metier suggest`` with the first answers."""
    known = _known(facts)
    rows = []
    for question, wish in choose.REMEDIES.items():
        asked = {question: 0.3 if question == "noise" else True}
        found = choose.suggest(table=known, limit=3, **asked)  # type: ignore[arg-type]
        option = f"--{question.replace('_', '-')}" + (" 0.3" if question == "noise" else "")
        rows.append([f"`metier suggest {option}`", ", ".join(_link(s.id, up) for s in found), escape(wish.check)])
    return table(["question", "first answers", "how to see that it helps"], rows)


TABLES: dict[str, Callable[[Facts, str], str]] = {
    "records": records, "fields": fields, "reasons": reasons, "places": places, "remedies": remedies,
}  # fmt: skip
