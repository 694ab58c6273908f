"""The documentation site, from its Markdown: complete pages, links that lead somewhere, text shown as written."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from metier import catalog, docsite
from metier.core import part
from metier.core.errors import UsageError
from metier.core.part import KINDS, Beta, Count, Positive, listing
from metier.core.resolve import common_schema
from metier.docsite import facts as gathered
from metier.docsite import partpages, text
from metier.docsite.facts import Facts, read_finding

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<![!\\])\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^( *)```.*?^\1```$", re.S | re.M)


@pytest.fixture(scope="module")
def facts() -> Facts:
    return docsite.gather()


@pytest.fixture(scope="module")
def pages(facts) -> dict[str, str]:
    return docsite.pages(facts)


def prose(markdown: str) -> str:
    return CODE.sub("", markdown)


def anchors(markdown: str) -> set[str]:
    """Anchors as the toc extension makes them, given ones included."""
    found = set()
    for m in re.finditer(r"^#+ (.+?)(?: \{ (.*) \})?$", prose(markdown), re.M):
        given = re.search(r"#([\w-]+)", m[2] or "")
        words = re.sub(r"[^\w\s-]", "", m[1].replace("\\", "")).strip().lower()
        found.add(given[1] if given else re.sub(r"[-\s]+", "-", words))
    return found


def test_every_part_has_a_page_with_all_its_options(pages):
    for item in listing():
        page = pages[f"parts/{item.id}.md"]
        names = [*part.options(part.load(item.id)), *common_schema(item.kind)]
        assert all(f"| `{n}` |" in page for n in names), item.id
        assert f"](parts/{item.id}.md)" not in page
        assert f"({item.id}.md)" in pages["parts/index.md"]
        assert Path(item.path).read_text(encoding="utf-8").splitlines()[-1].strip() in page


def test_every_row_has_a_page_and_stands_in_both_tables(pages):
    for row in catalog.rows():
        page = pages[f"rows/{row.row}.md"]
        assert row.link in page
        for c in row.cards:
            assert catalog.card(c).summary[:20] in page.replace("\\", "")
        for table in ("rows/index.md", "rows/kinds.md"):
            assert f"({row.row}.md)" in pages[table]


def test_corrected_titles_are_shown(pages):
    row = next(r for r in catalog.rows() if r.corrected)
    assert text.escape(row.corrected[0]) in pages[f"rows/{row.row}.md"]


def test_every_kind_has_a_sentence_and_a_section(pages):
    assert set(partpages.KIND_TEXT) == set(KINDS)
    assert set(KINDS) <= anchors(pages["parts/index.md"])


def test_internal_links_lead_somewhere(pages):
    for name, page in pages.items():
        for target in LINK.findall(prose(page)):
            if target.startswith(("http:", "https:", "mailto:")):
                continue
            path, _, anchor = target.partition("#")
            where = (Path("/") / Path(name).parent / path).resolve().relative_to("/").as_posix() if path else name
            assert where in pages, f"{name} links to {target}"
            assert not anchor or anchor in anchors(pages[where]), f"{name} links to {target}"


def test_pictures_exist(pages):
    for name, page in pages.items():
        for target in IMAGE.findall(page):
            assert (ROOT / "docs" / Path(name).parent / target).is_file(), f"{name} shows {target}"


def test_links_of_the_readme_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/tour.md", "docs/limits.md"):
        words = (ROOT / name).read_text(encoding="utf-8")
        for target in [*LINK.findall(prose(words)), *IMAGE.findall(words)]:
            if not target.startswith(("http", "#")):
                path = target.partition("#")[0]
                assert (ROOT / Path(name).parent / path).exists(), f"{name} links to {target}"


def test_nothing_unfinished_is_published(pages):
    for name, page in pages.items():
        assert not re.search(r"\bTODO\b|\bFIXME\b|\bXXX\b", page), name


def test_the_menu_names_pages_that_exist(pages):
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    named = re.findall(r": (\S+\.md)$", menu, re.M)
    assert len(named) > 10
    assert set(named) <= set(pages)


def test_nothing_is_fetched_when_the_site_is_read():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in settings
    assert "http" not in settings
    for path in (ROOT / "src/metier/docsite/assets").iterdir():
        assert "http" not in path.read_text(encoding="utf-8")


def test_the_command_line_page_has_every_verb_and_option(pages):
    from metier.cli import load
    from metier.docsite.commands import written

    page = pages["commands.md"]
    assert {"train", "compare", "list", "show", "docs"} <= set(written())
    sections = dict(re.findall(r"^## ([\w-]+)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    for verb in written():
        command = load(verb)
        for sub in getattr(command, "commands", {"": command}).values():
            named = [p.opts for p in sub.params if p.param_type_name == "option" and "completion" not in p.name]
            assert all(f"`{', '.join(o)}`" in sections[verb] for o in named if "--help" not in o), verb


def test_every_recipe_is_shown(pages):
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"## {path.stem}\n" in pages["recipes.md"]
        assert path.read_text(encoding="utf-8").rstrip().splitlines()[-1] in pages["recipes.md"]


def test_write_empties_the_folder_and_copies_assets(tmp_path, facts):
    old = tmp_path / "site" / "old.md"
    old.parent.mkdir()
    old.write_text("x")
    n = docsite.write(tmp_path / "site", facts)
    assert not old.exists()
    assert n == len(list((tmp_path / "site").rglob("*.md")))
    assert (tmp_path / "site" / "assets" / "extra.css").is_file()


def test_gather_refuses_a_folder_that_is_no_checkout(tmp_path):
    with pytest.raises(UsageError, match="checkout"):
        docsite.gather(tmp_path)


# --- pieces --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (Beta, "0 ≤ float < 1"),
        (Positive, "float > 0"),
        (Count, "int ≥ 1"),
        (bool, "true or false"),
        (Positive | None, "float > 0 or null"),
        (Literal["a", "b"], "one of `a`, `b`"),
        (list[str], "list of text"),
        (tuple[int, ...], "list of int"),
        (dict[str, Count], "mapping of text to int ≥ 1"),
        (Annotated[float, "unrelated"], "float"),
    ],
)
def test_types_are_words(annotation: Any, expected: str):
    assert text.type_text(annotation) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.9, "0.9"), (None, "null"), (True, "true"), ("exact", "exact"), ("no", '"no"'), ("a b", '"a b"')],
)
def test_defaults_are_yaml(value: Any, expected: str):
    from metier.core.yamlfile import parse_value

    assert text.default_text(value) == expected
    assert parse_value(text.default_text(value)) == value


def test_escaping_keeps_formulas_and_code():
    assert text.escape("W_Q x_i < 3 * 4 *") == r"W\_Q x\_i &lt; 3 \* 4 \*"
    assert text.escape("see ``a_b`` and `c*d`") == "see ``a_b`` and `c*d`"
    assert text.escape("2. not a list") == r"2\. not a list"


def test_meaning_is_the_sentence_that_begins_with_the_option():
    doc = "Moves.\n\n``beta`` averages. ``eps``: keeps it finite.\nWithout ``gamma`` nothing."
    assert text.about("beta", doc) == "``beta`` averages"
    assert text.about("eps", doc) == "keeps it finite"
    assert text.about("gamma", doc) == ""


def test_named_parts_become_links():
    known = {"optimizer/lion"}
    assert text.link_parts("use `optimizer/lion`", known, "../") == "use [`optimizer/lion`](../parts/optimizer/lion.md)"
    assert text.link_parts("`metier show optimizer/lion`", known, "") == "[`metier show optimizer/lion`](parts/optimizer/lion.md)"
    assert text.link_parts("`optimizer/soap`, [`optimizer/lion`](x)", known, "") == "`optimizer/soap`, [`optimizer/lion`](x)"


def a_result() -> dict[str, Any]:
    def run(arm: str, seed: int, value: float) -> dict[str, Any]:
        curve = {"step": [1], "tokens": [8], "seconds": [0.1], "value": [value]}
        return {
            "arm": arm, "seed": seed, "trial": None, "options": {}, "metric": value, "status": "done", "error": None,
            "curve": curve, "eval_curve": None, "seconds": 1.0, "tokens": 8, "flops": 1.0, "peak_bytes": 1,
            "state_bytes": 1, "params": 1, "folder": "",
        }  # fmt: skip

    arms = [("lion", {"optimizer": {"lion": {}}}, False), ("adamw", {"optimizer": "adamw"}, True)]
    return {
        "name": "duel", "question": "Is Lion better?", "metric": "eval_loss", "lower_is_better": True,
        "budget": {"kind": "tokens", "amount": 8}, "minimum_effect": 0.1, "seeds": [0, 1, 2], "tuning": [],
        "arms": [{"name": n, "label": n, "overrides": o, "is_control": c} for n, o, c in arms],
        "runs": [*(run("lion", s, 2.5 + s / 100) for s in range(3)), *(run("adamw", s, 2.0 + s / 90) for s in range(3))],
        "environment": {}, "commands": ["metier compare duel.yaml"], "created": "2026-01-02T03:04:05+00:00",
        "code_hash": "x", "part": "optimizer/lion", "verdict": "against",
    }  # fmt: skip


def test_a_finding_is_shown_on_its_parts_and_in_the_list(facts):
    found = read_finding("optimizer/lion", a_result())
    assert found.parts == ("optimizer/lion", "optimizer/adamw")
    assert found.sentences[0].startswith("**against**")
    made = docsite.pages(Facts(facts.root, facts.parts, facts.statuses, (found,)))
    for page in ("parts/optimizer/lion.md", "parts/optimizer/adamw.md", "findings.md"):
        assert "Is Lion better?" in made[page]
        assert "**against**" in made[page]
    assert "Nothing yet" in made["parts/optimizer/signum.md"]
    assert "optimizer-lion" in anchors(made["findings.md"])
    assert "2026-01-02" in made["findings.md"]


def test_an_unreadable_finding_says_so(tmp_path):
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "lion.json").write_text(json.dumps({"name": "x"}))
    (tmp_path / "broken.json").write_text("{")
    found = list(gathered._findings(tmp_path))
    assert [f.name for f in found] == ["broken", "optimizer/lion"]
    assert all("cannot be read" in f.sentences[0] for f in found)
