"""The code hash: blind to layout, comments and docstrings, and to nothing else."""

import ast
from pathlib import Path

import pytest

from metier.catalog.hashing import code_hash

SOURCE = '''"""A rule."""

from x import part


@part("optimizer/rule", paper="P", rows=(4,))
class Rule:
    """Doc."""

    beta: float = 0.9
    """Of the average."""

    def update(self, g, state, *, eps=1e-8, names=("a", None)):
        """Step."""
        # why
        m = state["m"] * self.beta + g
        if m > 0 and not eps:
            return -m
        return f"{m:.2f}" if names else m
'''
SAME = {
    "comment": SOURCE.replace("# why", "# because\n        # of this"),
    "comment gone": SOURCE.replace("        # why\n", ""),
    "docstrings": SOURCE.replace("A rule.", "Another.").replace("Doc.", "Text.").replace("Of the average.", "Decay."),
    "docstring gone": SOURCE.replace('        """Step."""\n', ""),
    "layout": SOURCE.replace("        return -m", "        return (\n                -m\n            )"),
    "quotes": SOURCE.replace('state["m"]', "state['m']"),
    "line ends": SOURCE.replace("\n", "\r\n"),
}
OTHER = {
    "number": SOURCE.replace("0.9", "0.95"),
    "number type": SOURCE.replace("rows=(4,)", "rows=(4.0,)"),
    "true for one": SOURCE.replace("rows=(4,)", "rows=(True,)"),
    "operator": SOURCE.replace("* self.beta", "/ self.beta"),
    "sign": SOURCE.replace("return -m", "return +m"),
    "comparison": SOURCE.replace("m > 0", "m >= 0"),
    "and for or": SOURCE.replace(" and ", " or "),
    "operand order": SOURCE.replace("self.beta + g", "g + self.beta"),
    "option name": SOURCE.replace("eps", "epsilon"),
    "default": SOURCE.replace("1e-8", "1e-6"),
    "none": SOURCE.replace("None", "'None'"),
    "keyword-only": SOURCE.replace("*, eps", "eps"),
    "string that is used": SOURCE.replace('state["m"]', 'state["v"]'),
    "format": SOURCE.replace(".2f", ".3f"),
    "statement gone": SOURCE.replace("        if m > 0 and not eps:\n            return -m\n", ""),
    "decorator": SOURCE.replace("optimizer/rule", "optimizer/other"),
}


def write(folder: Path, text: str, name: str = "rule.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("name", SAME)
def test_what_does_not_change_behaviour_does_not_change_the_hash(tmp_path, name):
    assert SAME[name] != SOURCE
    ast.parse(SAME[name])
    a, b = write(tmp_path / "a" / "parts", SOURCE), write(tmp_path / "b" / "parts", SAME[name])
    assert code_hash([a]) == code_hash([b])


@pytest.mark.parametrize("name", OTHER)
def test_what_may_change_behaviour_changes_the_hash(tmp_path, name):
    assert OTHER[name] != SOURCE
    ast.parse(OTHER[name])
    a, b = write(tmp_path / "a" / "parts", SOURCE), write(tmp_path / "b" / "parts", OTHER[name])
    assert code_hash([a]) != code_hash([b])


def test_order_and_repetition_of_paths_do_not_matter(tmp_path):
    a, b = write(tmp_path, SOURCE), write(tmp_path, "x = 1\n", "other.py")
    assert code_hash([a, b]) == code_hash([str(b), a, b])
    assert code_hash([a, b]) != code_hash([a])
    assert code_hash([]) != code_hash([a])


def test_contents_swapped_between_files_are_seen(tmp_path):
    a = [write(tmp_path / "a", "x = 1\n", n) for n in ("p.py", "q.py")]
    a[1].write_text("x = 2\n")
    b = [write(tmp_path / "b" / "a", "x = 2\n", "p.py"), write(tmp_path / "b" / "a", "x = 1\n", "q.py")]
    assert code_hash(a) != code_hash(b)


def test_a_renamed_file_has_another_hash(tmp_path):
    assert code_hash([write(tmp_path, SOURCE)]) != code_hash([write(tmp_path, SOURCE, "rule_b.py")])


def test_files_that_are_not_python_count_by_their_text(tmp_path):
    path = write(tmp_path, "a: 1\nb: 2\n", "run.yaml")
    first = code_hash([path])
    write(tmp_path, "a: 1\r\nb: 2\r\n", "run.yaml")
    assert code_hash([path]) == first
    write(tmp_path, "a: 1\nb: 3\n", "run.yaml")
    assert code_hash([path]) != first


def test_an_unfinished_python_file_has_a_hash(tmp_path):
    assert code_hash([write(tmp_path, "def f(:\n")]) != code_hash([write(tmp_path, "def g(:\n")])


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        code_hash([tmp_path / "none.py"])


def test_the_hash_is_the_same_everywhere(tmp_path):
    # Findings are committed: the value must not depend on the Python version or on where the checkout lies.
    path = write(tmp_path / "optimizer", SOURCE)
    assert code_hash([path]) == "0d6ec15b4908fce943cc0df25e1b229b1b424f9644b66c0129def4244a571951"
