"""The contract suite of its kind, over every part that is registered, and over options that change what a part reads."""

import importlib.util

import pytest

from metier.core.part import KINDS, listing
from metier.testing import check_part, objective, source

SUITES = [kind for kind in KINDS if importlib.util.find_spec(f"metier.testing.{kind}")]
VARIANTS = {
    "nash-md, tokens of lists": (objective, "nash-md", {"per": "token"}),
    "spa, logits of pairs": (objective, "spa", {"lam": 0.5}),
    "wpo, tokens within tokens": (objective, "wpo", {"of": "unlikelihood"}),
    "with-margin, per token": (objective, "with-margin", {"of": "dpo", "per": "token"}),
    "length-normalized, lists": (objective, "length-normalized", {"of": "lipo"}),
    "label-smoothing, a state inside": (objective, "label-smoothing", {"of": "beta-dpo"}),
    "ultrafeedback, answers of the model": (source, "ultrafeedback", {"sample": 2}),
    "constraint-pairs, tree": (source, "constraint-pairs", {"method": "tree", "iterations": 2}),
    "mix, sampled": (source, "mix", {"choice": "sampled", "stop": "first_exhausted"}),
    "pairs, top-random": (source, "pairs", {"builder": "top-random"}),
}


@pytest.mark.parametrize("id", [item.id for item in listing() if item.kind in SUITES])
def test_contract(id):
    done = check_part(id)
    assert done
    if id.startswith("source/"):  # one that nothing could be given to would only be constructed
        assert any(check.startswith("reads ") for check in done)


@pytest.mark.parametrize("name", VARIANTS)
def test_contract_with_other_options(name):
    suite, part, options = VARIANTS[name]
    assert suite.check(f"{suite.__name__.rsplit('.')[-1]}/{part}", **options)
