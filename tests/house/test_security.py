"""F12: nothing in the package can execute what it reads."""

import ast
import re
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src" / "metier"
FILES = sorted(SRC.rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
}
TEXT = re.compile(
    r"allow_pickle\s*=\s*True|shell\s*=\s*True|trust_remote_code\s*=\s*True|weights_only\s*=\s*False|verify\s*=\s*False"
)


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def problems(text: str) -> list[str]:
    found = [m.group() for m in TEXT.finditer(text)]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in MODULES else []
            found += [f"{node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in CALLS]
        elif isinstance(node, ast.Call) and dotted(node.func) in CALLS:
            found.append(dotted(node.func))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_nothing_that_executes_data(path):
    assert problems(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "bad",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "from torch import load",
        "eval('1')", "exec('1')", "f(shell=True)", "f(trust_remote_code = True)", "f(allow_pickle=True)",
        "import os\nos.system('x')",
    ],
)  # fmt: skip
def test_the_search_finds(bad):
    assert problems(bad)


def test_a_models_own_eval_is_no_problem():
    assert problems("model.eval()\nload_file('x')\nre.compile('x')") == []
