"""The limits that keep files findable and short, and the rules that keep parts independent."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src" / "metier"
FILES = sorted(SRC.rglob("*.py"))
LIMITS = {"parts": 150, "cli": 120, "core": 400}


def limit(path: Path) -> int:
    return LIMITS.get(path.relative_to(SRC).parts[0], 400)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_file_and_function_length(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= limit(path)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return found


def test_no_kind_imports_another_and_core_imports_no_part():
    for path in FILES:
        where = path.relative_to(SRC).parts
        parts = {i for i in imports(path) if i.startswith("metier.parts.")}
        if where[0] == "parts" and len(where) == 3:
            assert all(i.startswith(f"metier.parts.{where[1]}") for i in parts), path
        elif where[0] in ("core", "compare", "cli", "lab", "catalog"):
            assert not parts, f"{path} imports {parts}"


def test_core_names_no_technique():
    """No string constant in core or compare is the id of a part, except where it is only an example in a docstring."""
    from metier.core.part import listing

    ids = {p.id for p in listing()}
    for path in [p for p in FILES if p.relative_to(SRC).parts[0] == "core"]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        allowed = {"optimizer/adamw"} if path.name == "optim.py" else set()
        assert not (strings & ids) - allowed, path


def test_no_kwargs_in_parts():
    for path in (SRC / "parts").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.args.kwarg is None, f"{path}: {node.name} takes **{node.args.kwarg.arg}"


def test_each_part_file_holds_its_part_and_has_an_oracle():
    from metier.core.part import ROOT, read_file

    tests = SRC.parents[1] / "tests" / "parts"
    for path in sorted(ROOT.glob("*/*.py")):
        if path.name.startswith("_"):
            continue
        found = list(read_file(path, "x"))
        assert [i.id for i in found] == [f"{path.parent.name}/{path.stem.replace('_', '-')}"], path
        assert (tests / path.parent.name / f"test_{path.stem}.py").is_file(), f"{path} has no oracle test"
        assert found[0].summary, f"{path} has no docstring"


FAST = "import sys, {module}; bad = {{'torch', 'transformers', 'scipy', 'numpy'}} & set(sys.modules); assert not bad, bad"


@pytest.mark.parametrize(
    "module", ["metier", "metier.cli", "metier.core.part", "metier.catalog", "metier.optimizers", "metier.lab"]
)
def test_import_is_light(module):
    subprocess.run([sys.executable, "-c", FAST.format(module=module)], check=True)
