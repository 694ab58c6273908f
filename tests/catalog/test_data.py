"""The catalogue as data: complete, in the list's order, quick to read, and free of torch."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metier import catalog
from metier.core.errors import UsageError

LIST = Path(__file__).resolve().parents[2].parent / "shared" / "rows.tsv"


def reading_list() -> list[tuple[int, str, str, str]]:
    """(row, title, link, section) as the reading list has them, read here independently of the package."""
    if not LIST.is_file():
        pytest.skip("the reading list is not beside the checkout")
    found, section = [], ""
    for line in LIST.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:]
        else:
            number, title, link, *_ = line.split("\t")
            found.append((int(number), title, link, section))
    return found


def test_every_row_is_there_once_and_in_order():
    assert [r.row for r in catalog.rows()] == list(range(1, 159))


def test_rows_are_those_of_the_reading_list():
    assert [(r.row, r.title, r.link, r.section) for r in catalog.rows()] == reading_list()


def test_rows_and_cards_point_at_each_other():
    from_rows = {(r.row, c) for r in catalog.rows() for c in r.cards}
    from_cards = {(n, c.id) for c in catalog.cards().values() for n in c.rows}
    assert from_rows == from_cards
    assert all(r.cards for r in catalog.rows())
    assert len(catalog.cards()) == 160


def test_only_the_two_family_sheets_have_no_row():
    assert {c.id for c in catalog.cards().values() if not c.rows} == {
        "policy-gradient-family", "preference-loss-family",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("number", "cards"),
    [
        (37, ("mam-adapter", "stepwise-internalization")),
        (61, ("code-diversity", "effective-semantic-diversity")),
        (126, ("vas", "surge-lr-batch")),
    ],
)
def test_where_title_and_link_disagree_both_papers_are_given(number, cards):
    row = catalog.row(number)
    assert row.cards == cards
    assert row.corrected == tuple(catalog.card(c).title for c in cards)
    assert row.note


@pytest.mark.parametrize(("first", "second"), [(5, 16), (30, 32), (91, 93)])
def test_two_rows_of_one_paper_share_its_card(first, second):
    assert catalog.row(first).cards == catalog.row(second).cards
    assert catalog.card(catalog.row(first).cards[0]).rows == (first, second)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (10, "Quantization"),
        (29, "Inference-Optimized"),
        (64, "Capabilities"),
        (133, "Paradox"),
        (138, "Ratings"),
    ],
)
def test_misspelt_titles_are_corrected(number, words):
    assert words in catalog.row(number).corrected[0]
    assert words.lower() not in catalog.row(number).title.lower()


def test_a_right_title_is_not_corrected():
    assert catalog.row(4).corrected == ()
    assert catalog.row(16).corrected == (), "row 16 is the workshop paper, under its own title"


def test_kind_and_parts_of_a_row_come_from_its_cards():
    assert catalog.row(4).kind == "trick"
    assert catalog.row(4).parts == ("optimizer/soap",)
    both = (*catalog.card("mam-adapter").parts, *catalog.card("stepwise-internalization").parts)
    assert catalog.row(37).parts == both


def test_an_unknown_card_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="unknown card 'soup'") as e:
        catalog.card("soup")
    assert "soap" in str(e.value)
    assert e.value.exit_code == 2


def test_card_ids_take_underscores_and_any_case():
    assert catalog.card("Model_Soups") is catalog.card("model-soups")


@pytest.mark.parametrize("number", [0, -1, 159])
def test_a_row_outside_the_list_is_refused(number):
    with pytest.raises(UsageError, match="from 1 to 158"):
        catalog.row(number)


def test_nothing_can_be_changed_by_a_reader():
    with pytest.raises(dataclasses.FrozenInstanceError):
        catalog.row(1).title = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        catalog.cards()["soap"] = catalog.card("mars")  # type: ignore[index]
    assert isinstance(catalog.card("soap").pitfalls, tuple)


def test_search_puts_the_id_and_title_first_and_needs_every_word():
    assert catalog.search("Warmup")[0].id == "warmup-free-training"
    assert [c.id for c in catalog.search("shampoo eigenbasis")] == ["soap"]
    assert catalog.search("soap nosuchword") == ()
    assert catalog.search("  ") == ()
    assert catalog.search("capabilitiew")[0].id == "emergence-law", "the list's own spelling is found too"


def test_reading_takes_milliseconds():
    # The limit is five times what the slowest machine so far needed; the best of three keeps other load out.
    def once() -> float:
        catalog.load.cache_clear()
        start = time.perf_counter()
        catalog.load()
        return time.perf_counter() - start

    assert min(once() for _ in range(3)) < 0.02


def test_reading_and_judging_imports_no_torch():
    code = (
        "import sys; from metier import catalog; from metier.catalog.status import rows_status;"
        "catalog.search('lora'); rows_status();"
        "print([m for m in ('torch', 'transformers', 'numpy', 'yaml', 'ruamel') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
