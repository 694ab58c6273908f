"""Computed status: every piece of evidence counts, and nothing is taken on trust."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from metier import catalog
from metier.catalog.status import Places, code_hash, guide_points, row_status, rows_status

KEYS = ["row", "title", "link", "section", "kind", "parts", "study", "finding", "status", "missing"]


@dataclass
class Part:
    id: str
    path: str
    rows: tuple[int, ...] = ()


class World:
    """A project on disk with parts, tests, findings, docs and guides of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.places = Places(root / "tests", root / "findings", root / "docs", root / "guides")
        self.parts: dict[str, Part] = {}
        (root / "docs").mkdir(parents=True)
        self.write("src/metier/docsite/build.py", "")

    def write(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    def part(self, id: str, *, tested: bool = True, rows: tuple[int, ...] = ()) -> Part:
        kind, name = id.split("/")
        name = name.replace("-", "_")
        path = self.write(f"parts/{kind}/{name}.py", f"NAME = {id!r}\n")
        if tested:
            self.write(f"tests/parts/{kind}/test_{name}.py", "")
        self.parts[id] = Part(id, str(path), rows)
        return self.parts[id]

    def finding(self, name: str, parts: list[str], **extra) -> Path:
        hashed = code_hash(self.parts[p].path for p in parts)
        return self.write(f"findings/{name}.json", json.dumps({"code_hash": hashed, **extra}))

    def status(self, row: int):
        return row_status(catalog.row(row), self.parts.values(), self.places)


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


def complete(world: World) -> None:
    world.part("optimizer/soap")
    world.finding("study/soap", ["optimizer/soap"])


def test_nothing_there_is_missing_and_says_what(world):
    s = world.status(4)
    assert s["status"] == "missing"
    assert s["finding"] is None
    assert s["missing"] == ["part optimizer/soap", "finding soap"]


def test_all_evidence_makes_it_work(world):
    complete(world)
    s = world.status(4)
    assert (s["status"], s["missing"]) == ("works", [])
    assert s["finding"] == "findings/study/soap.json"


def test_a_part_alone_is_partial(world):
    world.part("optimizer/soap", tested=False)
    s = world.status(4)
    assert s["status"] == "partial"
    assert s["missing"] == ["test optimizer/soap", "finding soap"]


def test_a_part_that_is_gone_is_missing_whatever_was_found(world):
    complete(world)
    del world.parts["optimizer/soap"]
    s = world.status(4)
    assert s["status"] == "partial"
    assert s["missing"] == ["part optimizer/soap", "stale finding findings/study/soap.json"]


def test_a_finding_is_stale_when_the_code_changed(world):
    complete(world)
    Path(world.parts["optimizer/soap"].path).write_text("NAME = 'optimizer/soap'\nBETA = 0.95\n")
    s = world.status(4)
    assert s["status"] == "partial"
    assert s["missing"] == ["stale finding findings/study/soap.json"]
    assert s["finding"] == "findings/study/soap.json"


def test_a_finding_survives_a_comment(world):
    complete(world)
    Path(world.parts["optimizer/soap"].path).write_text("# SOAP\nNAME = 'optimizer/soap'\n")
    assert world.status(4)["status"] == "works"


def test_a_comparison_is_stale_when_its_control_changed(world):
    world.part("optimizer/soap")
    adamw = world.part("optimizer/adamw")
    arms = [
        {"name": "soap", "overrides": {"optimizer": {"soap": {"lr": 0.1}}}},
        {"name": "adamw", "overrides": {"optimizer": "adamw", "train.batch": 4}},
    ]
    world.finding("optimizer/soap", ["optimizer/soap", "optimizer/adamw"], arms=arms)
    assert world.status(4)["status"] == "works"
    assert world.status(4)["finding"] == "findings/optimizer/soap.json"
    Path(adamw.path).write_text("NAME = 'changed'\n")
    assert world.status(4)["missing"] == ["stale finding findings/optimizer/soap.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"code_hash": "x", "arms": [1]}'])
def test_an_unreadable_finding_is_named(world, text):
    world.part("optimizer/soap")
    world.write("findings/study/soap.json", text)
    assert world.status(4)["missing"] == ["unreadable finding findings/study/soap.json"]


def test_findings_of_the_parts_stand_in_for_the_study_when_each_part_has_one(world):
    for name in ("lion-a", "lion-ar", "gi-adam"):
        world.part(f"optimizer/{name}")
        world.finding(f"optimizer/{name}", [f"optimizer/{name}"])
    world.part("hook/rrc-control")
    world.part("probe/update-size")
    assert world.status(5)["missing"] == ["finding hook/rrc-control", "finding probe/update-size"]
    world.finding("hook/rrc-control", ["hook/rrc-control"])
    world.finding("probe/update-size", ["probe/update-size"])
    assert world.status(5)["status"] == "works"
    assert world.status(16)["status"] == "works", "the workshop version shares the card"


def test_the_study_counts_before_the_parts(world):
    complete(world)
    world.write("findings/optimizer/soap.json", json.dumps({"code_hash": "old"}))
    assert world.status(4)["status"] == "works"


def test_a_study_without_parts_works_by_its_finding(world):
    assert catalog.row(158).parts == ()
    assert world.status(158)["status"] == "missing"
    world.part("objective/dpo")
    arms = [{"name": "offline", "overrides": {"objective": "dpo"}}]
    world.finding("study/generation-verification-gap", ["objective/dpo"], arms=arms)
    assert world.status(158)["status"] == "works"


def test_a_row_of_two_papers_needs_both_findings(world):
    for p in catalog.row(37).parts:
        world.part(p)
    world.finding("study/mam-adapter", list(catalog.card("mam-adapter").parts))
    s = world.status(37)
    assert s["study"] == "mam-adapter"
    assert (s["status"], s["missing"]) == ("partial", ["finding stepwise-internalization"])
    world.finding("study/stepwise-internalization", list(catalog.card("stepwise-internalization").parts))
    assert world.status(37)["status"] == "works"


def test_a_part_that_declares_the_row_belongs_to_it(world):
    complete(world)
    world.part("probe/eigenbasis", rows=(4,), tested=False)
    s = world.status(4)
    assert s["parts"] == ["optimizer/soap", "probe/eigenbasis"]
    assert s["missing"] == ["test probe/eigenbasis"]
    assert "probe/eigenbasis" not in world.status(3)["parts"]


def test_a_page_is_needed_but_does_not_count_alone(world):
    assert world.status(4)["status"] == "missing"
    complete(world)
    shutil.rmtree(world.root / "src")
    assert world.status(4)["missing"] == ["page in the docs"]
    world.write("docs/rows/4.md", "# SOAP\n")
    assert world.status(4)["status"] == "works"
    assert "page in the docs" in world.status(3)["missing"]


def test_a_guide_needs_its_page_with_something_to_run_at_every_point(world):
    assert world.status(71)["missing"] == ["guide llm-alignment-survey"]
    assert (world.status(71)["status"], world.status(71)["study"]) == ("missing", None)
    page = "# Map\n\n- Outer alignment: `metier show dpo`\n- Inner alignment\n  needs [a study](75.md)\n- Attacks\n"
    world.write("guides/llm-alignment-survey.md", page)
    assert world.status(71)["status"] == "partial"
    assert world.status(71)["missing"] == ["1 points of guide llm-alignment-survey without something to run"]
    world.write("guides/llm-alignment-survey.md", page.replace("- Attacks", "- Attacks: `metier list probe`"))
    assert world.status(71)["status"] == "works"


def test_guide_points_are_the_list_items_with_their_continuation():
    assert guide_points("a\n- b\n  c\n\n* d\ne\n  - f") == ["- b c", "* d", "  - f"]


def test_a_guide_with_parts_needs_them_too(world):
    world.write("guides/cl-llm-survey-wu.md", "- metrics: `metier probe continual-metrics`\n")
    assert world.status(33)["missing"] == ["part probe/continual-metrics"]


def test_without_tests_at_hand_a_current_finding_vouches_for_them(world):
    world.part("optimizer/soap", tested=False)
    world.places = Places(None, world.root / "findings", None, world.root / "guides")
    assert world.status(4)["missing"] == ["unknown tests", "finding soap"]
    world.finding("study/soap", ["optimizer/soap"])
    assert world.status(4)["status"] == "works"
    Path(world.parts["optimizer/soap"].path).write_text("NAME = 'changed'\n")
    assert "unknown tests" in world.status(4)["missing"]


def test_an_installation_without_findings_is_partial_at_best(world):
    world.part("optimizer/soap")
    world.places = Places(None, None, None, world.root / "guides")
    assert world.status(4)["missing"] == ["unknown tests", "finding soap"]
    assert world.status(4)["status"] == "partial"


def test_every_row_has_exactly_the_printed_keys_and_json_types(world):
    complete(world)
    found = rows_status(world.parts.values(), world.places)
    assert [list(s) for s in found] == [KEYS] * 158
    assert json.loads(json.dumps(found)) == found
    assert {s["status"] for s in found} == {"works", "missing"}
    for s, r in zip(found, catalog.rows(), strict=True):
        assert (s["row"], s["title"], s["link"], s["section"]) == (r.row, r.title, r.link, r.section)
        assert all(m and "\n" not in m and len(m) < 100 for m in s["missing"])


def test_the_checkout_is_found():
    here = Places.here()
    assert here.tests == Path(__file__).resolve().parents[1]
    assert here.findings is not None
    assert here.findings.parent == here.tests.parent
