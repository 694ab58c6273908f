"""The contract suite of its kind, over every part that is registered."""

import importlib.util

import pytest

from metier.core.part import KINDS, listing
from metier.testing import check_part

SUITES = [kind for kind in KINDS if importlib.util.find_spec(f"metier.testing.{kind}")]


@pytest.mark.parametrize("id", [item.id for item in listing() if item.kind in SUITES])
def test_contract(id):
    assert check_part(id)
