"""The tour, run as it stands: its blocks in order, in a copy of the checkout, offline."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.S | re.M)
TEXT = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
SHELL = f'set -eu -o pipefail\nmetier() {{ "{sys.executable}" -m metier "$@"; }}\n'


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """Sources, recipes and test folders, without results: what a reader has after ``git clone``."""
    folder = tmp_path_factory.mktemp("tour")
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("src", "recipes", "docs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def said(checkout) -> dict[str, str]:
    """Runs every block; the output by the heading it stands under."""
    env = os.environ | {"PYTHONPATH": str(checkout / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    out: dict[str, str] = {}
    for m in BLOCK.finditer(TEXT):
        heading = re.findall(r"^## (.+)$", TEXT[: m.start()], re.M)[-1]
        language, code = m.groups()
        command = ["bash", "-c", SHELL + code] if language == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{heading}:\n{code}\n{done.stdout}\n{done.stderr}"
        out[heading] = out.get(heading, "") + done.stdout + done.stderr
    return out


def test_lists_and_shows(said):
    text = said["Look around"]
    assert "optimizer/adamw" in text
    assert "beta1" in text
    assert "SOAP" in text
    assert "158 rows" in text


def test_trains_and_names_the_misspelt_option(said):
    text = said["Train"]
    assert "done at step 20" in text
    assert "bata1" in text
    assert "beta1" in text
    assert "exit code 2" in text


def test_continues_and_reports(said, checkout):
    text = said["Stop and continue"]
    assert "done at step 30" in text
    assert "step 15/30" not in text, "it started afresh"
    assert "runs/first" in text
    assert (checkout / "runs" / "first" / "report.html").is_file()


def test_names_the_bad_row(said):
    text = said["Your own data"]
    assert re.search(r"mine\.jsonl:3|^3 ", text, re.M)
    assert "exit code 1" in text
    assert "Paris" in text


def test_compares(said, checkout):
    assert re.search(r"^(holds|direction|unclear|against): ", said["Compare"], re.M)
    assert (checkout / "comparisons" / "duel" / "report.html").is_file()


def test_parts_work_elsewhere(said):
    assert float(re.search(r"loss ([\d.]+)", said["A part in your own loop"])[1]) < 5
    assert "done 5" in said["A part in your own loop"]


def test_a_new_part_is_checked_and_trained(said):
    text = said["A new part"]
    assert "test_heavy_ball.py" in text
    assert "done at step 5" in text
