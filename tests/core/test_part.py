import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from metier.core import part
from metier.core.errors import UsageError
from metier.core.part import Beta, Count, Positive


@part.part("optimizer/toy", paper="none", needs=("closure",))
@dataclass(frozen=True, kw_only=True)
class Toy:
    """A toy."""

    beta: Beta = 0.9
    mode: Literal["a", "b"] = "a"
    rank: Count | None = None
    pair: tuple[float, float] = (0.0, 1.0)


def options(**given):
    return part.check_options(part.options(Toy), given, owner="optimizer/toy")


def test_options_are_read_from_the_signature():
    schema = part.options(Toy)
    assert list(schema) == ["beta", "mode", "rank", "pair"]
    assert schema["beta"].default == 0.9
    assert not schema["beta"].required


@pytest.mark.parametrize(
    ("given", "value"),
    [({"beta": 0}, 0), ({"rank": None}, None), ({"rank": 3}, 3), ({"mode": "b"}, "b"), ({"pair": [1, 2]}, (1.0, 2.0))],
)
def test_valid_values(given, value):
    assert next(iter(options(**given).values())) == value


@pytest.mark.parametrize(
    "given",
    [{"beta": 1.0}, {"beta": -0.1}, {"beta": "0.9"}, {"beta": None}, {"beta": True}, {"rank": 0}, {"rank": 1.5},
     {"mode": "c"}, {"pair": [1]}, {"pair": "ab"}],
)  # fmt: skip
def test_invalid_values_name_the_option(given):
    with pytest.raises(UsageError, match=next(iter(given))):
        options(**given)


def test_misspelt_option_suggests():
    with pytest.raises(UsageError, match="Did you mean 'beta'"):
        options(bta=0.5)


def test_declaration_is_checked():
    with pytest.raises(UsageError, match="closure"):
        part.part("optimizer/x", paper="none", needs=("closur",))
    with pytest.raises(UsageError, match="part id"):
        part.part("optimiser/x", paper="none")
    with pytest.raises(UsageError, match="kwargs"):

        @part.part("optimizer/x", paper="none")
        def f(**kwargs): ...

    with pytest.raises(UsageError, match="no type"):

        @part.part("optimizer/x", paper="none")
        def g(*, a=1): ...


def test_find_did_you_mean_and_dashes():
    assert part.find("sgd_momentum", "optimizer").id == "optimizer/sgd-momentum"
    with pytest.raises(UsageError, match="lion"):
        part.find("lionn", "optimizer")


def test_listing_equals_what_importing_finds():
    for item in part.listing():
        obj = part.load(item.id)
        card = obj.__metier__
        assert (card.id, card.paper, card.rows) == (item.id, item.paper, item.rows)
        assert (obj.__doc__ or "").strip()


def test_ranges_recur_in_types():
    schema = {"x": part.Option("x", Positive, 1.0, False)}
    with pytest.raises(UsageError):
        part.check_options(schema, {"x": 0}, owner="a/b")
    with pytest.raises(UsageError, match="nan|finite|greater"):
        part.check_options(schema, {"x": float("nan")}, owner="a/b")


def test_third_party_part_is_found_and_duplicates_refused(tmp_path):
    package = tmp_path / "theirs"
    (package / "theirs-1.0.dist-info").mkdir(parents=True)
    (package / "theirs-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    source = 'from metier.core.part import part\n@part("schedule/{n}", paper="none")\ndef {f}(clock, *, a: float = 1.0) -> float:\n    """Theirs."""\n    return a\n'
    (package / "their_module.py").write_text(source.format(n="theirs", f="theirs"))
    points = package / "theirs-1.0.dist-info" / "entry_points.txt"
    points.write_text("[metier.parts]\nschedule/theirs = their_module:theirs\n")
    code = f"import sys; sys.path.insert(0, {str(package)!r}); from metier.core import part; import json; print(json.dumps([i.id for i in part.listing()])); print(part.load('schedule/theirs')(None))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "schedule/theirs" in json.loads(out[0])
    assert out[1] == "1.0"
    taken = next(i for i in part.listing() if i.kind == "schedule").name
    (package / "their_module.py").write_text(source.format(n=taken, f="theirs"))
    points.write_text(f"[metier.parts]\nschedule/{taken} = their_module:theirs\n")
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"two parts are called schedule/{taken}" in failed.stderr


@pytest.mark.parametrize(("given", "needs"), [("typo", {"samples"}), ({"typo": {"lam": 0.0}}, set()), ("dpo", {"reference"})])
def test_needs_are_the_instances_own_else_the_cards(given, needs):
    """The options of typo decide; dpo is a function and has those of its card."""
    assert part.build("objective", given).needs == needs
    assert isinstance(part.build("objective", given).needs, frozenset)


def test_path_is_the_name():
    for item in part.listing():
        assert Path(item.path).stem.replace("_", "-") == item.name or "site-packages" in item.path
