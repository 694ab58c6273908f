"""Records of objectives: what every one declares is borne out by what it does, and the fields are what they are said to be.

The oracle is independent of ``core/taxonomy.py``: losses of the contract suite's batches under single changes, and a table of what
is known of well-known objectives. Objectives that lie are caught.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from metier.core import choose, taxonomy
from metier.core.batch import Lists, Pairs, Rated, Rewards
from metier.core.errors import UsageError
from metier.core.lossmodule import batch_type, scores_again
from metier.core.part import Built, Card, listing
from metier.testing._sample import sample
from metier.testing.objective import MAKERS, _case

LEARN = (Pairs, Rated, Lists, Rewards)


def preference_objectives() -> list[str]:
    found = []
    for item in listing():
        if item.kind == "objective":
            obj = sample(item.id).obj
            if not scores_again(obj) and batch_type(obj) in LEARN:
                found.append(item.id)
    return found


ALL = preference_objectives()


def test_every_preference_objective_has_a_record():
    assert list(taxonomy.described()) == ALL
    assert len(ALL) > 50


@pytest.mark.parametrize("id", ALL)
def test_declarations_are_borne_out(id):
    assert taxonomy.contradictions(id.split("/")[1]) == []
    t = taxonomy.traits(id)
    assert t.declared, "at least one place in the tree"
    assert set(t.declared) <= set(t.tags) <= set(taxonomy.TAGS)
    for name in taxonomy.columns():
        assert getattr(t, name) in taxonomy.FIELDS[name]


@pytest.mark.parametrize("id", ALL)
def test_reference_free_means_the_same_loss_for_any_reference(id):
    case, t = _case(id), taxonomy.traits(id)
    torch.manual_seed(0)
    batch = MAKERS[case.reads](case.needs | {"reference"}) if case.reads is not Rewards else case.batch()
    if t.reference == "based" or case.reads is Rewards or id == "objective/sami":  # that of sami takes squares only
        return
    plain, _ = case.run(batch)
    names = [n for n in ("ref_chosen_logps", "ref_rejected_logps", "ref_logps") if getattr(batch, n, None) is not None]
    assert names
    other, _ = case.run(replace(batch, **{n: torch.randn_like(getattr(batch, n)) for n in names}))
    assert torch.equal(plain, other)


@pytest.mark.parametrize("id", [i for i in ALL if taxonomy.traits(i).feedback == "binary"])
def test_binary_feedback_takes_unpaired_rows(id):
    case = _case(id)
    batch = case.batch()
    for label in (True, False):
        loss, _ = case.run(replace(batch, label=torch.full_like(batch.label, label)))
        assert torch.isfinite(loss).all()


@pytest.mark.parametrize("id", [i for i in ALL if taxonomy.traits(i).level == "token"])
def test_token_level_losses_change_when_tokens_are_exchanged_for_others_of_the_same_sum(id):
    case = _case(id)
    batch = case.batch()
    assert batch.tokens is not None
    rejected = (batch.tokens.sequence == 1).nonzero().flatten()[:2]
    moved = batch.tokens.logps.clone()
    moved[rejected[0]] -= 0.04
    moved[rejected[1]] += 0.04
    plain, other = (case.run(replace(batch, tokens=replace(batch.tokens, logps=v)))[0] for v in (batch.tokens.logps, moved))
    assert not torch.allclose(plain, other)


@pytest.mark.parametrize("id", [i for i in ALL if taxonomy.traits(i).reads == "Pairs"])
def test_a_merged_likelihood_pushes_where_the_pair_is_settled(id):
    case = _case(id)
    batch = case.batch()
    if batch.tokens is not None and "reference" in case.needs:
        return  # their sums follow from tokens; none of them has a likelihood term
    settled = replace(batch, rejected_logps=torch.full_like(batch.rejected_logps, -1e7))
    if batch.tokens is not None:
        rejected = batch.tokens.sequence % 2 == 1
        settled = replace(settled, tokens=replace(batch.tokens, logps=batch.tokens.logps.masked_fill(rejected, -1e6)))
    slopes = []
    for chosen in (torch.full_like(batch.chosen_logps, -1.0), torch.full_like(batch.chosen_logps, -300.0)):
        leaf = chosen.requires_grad_()
        loss, _ = case.run(replace(settled, chosen_logps=leaf))
        slopes.append(torch.autograd.grad(loss.sum(), leaf, allow_unused=True)[0] if loss.requires_grad else None)
    constant = all(s is not None and bool((s < 0).all()) for s in slopes) and torch.allclose(*slopes, rtol=1e-6)
    unbounded = (
        id == "objective/robust-dpo"
    )  # its push stays because the loss has no lower bound, and it pushes the bad answer too
    assert (constant and not unbounded) == (taxonomy.traits(id).sft == "merged")


KNOWN = {
    "dpo": {"reward": "implicit", "reference": "based", "length": "none", "sft": "separate", "divergence": "reverse-kl", "arity": "pair"},
    "simpo": {"reference": "free", "length": "mean", "sft": "separate", "divergence": "none"},
    "orpo": {"reference": "free", "length": "mean", "sft": "merged"},
    "cpo": {"reference": "free", "length": "none", "sft": "merged"},
    "slic-hf": {"reference": "free", "length": "none", "sft": "merged"},
    "rpo": {"reference": "based", "length": "none", "sft": "merged"},
    "kto": {"feedback": "binary", "arity": "single", "reference": "based", "signs": "both"},
    "npo": {"feedback": "binary", "signs": "negative"},
    "nll": {"signs": "positive", "sft": "merged"},
    "r-dpo": {"length": "explicit"},
    "ld-dpo": {"length": "explicit"},
    "ln-dpo": {"length": "mean", "reference": "based"},
    "odpo": {"reward": "explicit", "arity": "pair"},
    "pro": {"reward": "explicit", "arity": "list", "reference": "free", "sft": "merged"},
    "pl-dpo": {"reward": "implicit", "arity": "list"},
    "lipo": {"reward": "explicit", "arity": "list"},
    "ipo": {"model": "preference"},
    "sppo": {"model": "preference", "loop": "iterative"},
    "unlikelihood": {"level": "token", "sft": "merged"},
    "wpo": {"level": "response", "length": "none"},
    "bradley-terry": {"reward": "explicit", "model": "pointwise"},
    "typo": {"divergence": "forward-kl"},
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_known_objectives(name):
    t = taxonomy.traits(name)
    assert {k: getattr(t, k) for k in KNOWN[name]} == KNOWN[name]


@pytest.mark.parametrize(
    ("ref", "field", "value"),
    [({"npo": {"retain_weight": 1.0}}, "sft", "merged"), ({"logic": {"code": ".+-.", "reference": True}}, "reference", "based"),
     ({"odpo": {"alpha": 0.0}}, "reward", "implicit"), ({"ipo": {"average": False}}, "length", "none"),
     ({"length-normalized": {"of": "hinge"}}, "length", "mean"), ({"label-smoothing": {"of": "simpo"}}, "reference", "free"),
     ({"r-dpo": {"alpha": 0.0}}, "length", "none"), ({"combined": {"losses": ["dpo", "hinge"]}}, "sft", "separate")],
    ids=str,
)  # fmt: skip
def test_options_change_the_record(ref, field, value):
    assert getattr(taxonomy.traits(ref), field) == value


def test_the_likelihood_tag_is_the_direction_of_the_push():
    """DPO's two pushes are equal; one that only lowers rejected answers less than it raises chosen ones has the tag."""
    tag = "model/optimisation/likelihood"
    have = {id.split("/")[1] for id, t in taxonomy.described().items() if tag in t.tags}
    assert {"dpop", "rpo", "cal-dpo", "apo-zero", "nca", "orpo", "cpo", "exmate"} <= have
    assert not have & {"dpo", "ipo", "hinge", "simpo", "ln-dpo", "r-dpo", "cdpo", "exo", "apo-down", "alphapo", "pl-dpo", "wpo"}


# --- objectives that lie --------------------------------------------------------------------------------------


def margin(b: Pairs) -> torch.Tensor:
    return -F.logsigmoid(b.chosen_logps - b.rejected_logps)


def with_reference(b: Pairs) -> torch.Tensor:
    return -F.logsigmoid(b.chosen_logps - b.ref_chosen_logps - b.rejected_logps + b.ref_rejected_logps)


def built(function, needs=(), tags=(), traits=None) -> Built:
    from functools import partial

    def copy(b: Pairs) -> torch.Tensor:
        return function(b)

    copy.tags, copy.traits = tags, traits or {}
    return Built("objective/liar", Card("objective/liar", "-", needs=frozenset(needs)), partial(copy), {})


@pytest.mark.parametrize(
    ("liar", "told"),
    [(built(with_reference, tags=("data/feedback/pair",)), "changes with its scores"),
     (built(margin, needs=("reference",)), "does not change with its scores"),
     (built(margin, tags=("model/generation/length",)), "is said, but not shown"),
     (built(margin, tags=("model/optimisation/likelihood",)), "is said, but not shown"),
     (built(margin, tags=("data/feedback/list",)), "is said, but not shown"),
     (built(margin, tags=("data/qality",)), "unknown tag"),
     (built(margin, traits={"sft": ("merged", "so it is")}), "sft is said to be merged, but is separate"),
     (built(margin, traits={"model": ("preference", "")}), "has no reason"),
     (built(margin, traits={"model": ("cyclic", "so")}), "model cannot be cyclic"),
     (built(margin, traits={"modell": ("preference", "so")}), "unknown field modell")],
    ids=range(10),
)  # fmt: skip
def test_lies_are_found(liar, told):
    assert any(told in w for w in taxonomy.contradictions(liar)), taxonomy.contradictions(liar)


def test_the_truth_is_not_a_lie():
    assert taxonomy.contradictions(built(margin, tags=("data/feedback/pair", "constraint/reference/free"))) == []
    assert taxonomy.contradictions(built(with_reference, needs=("reference",), tags=("data/quality/noise",))) == []


def test_other_objectives_have_no_record():
    with pytest.raises(UsageError, match="does not learn from preferences"):
        taxonomy.traits("lm")
    with pytest.raises(UsageError, match="dpo"):
        taxonomy.traits("dpoo")


def test_records_leave_the_objective_as_it_was():
    """One that observes keeps its state."""
    from metier.core import part

    obj = part.build("objective", "bco")
    before = obj.obj.state_dict()
    taxonomy.of(obj)
    assert obj.obj.state_dict() == before


# --- filters and places ---------------------------------------------------------------------------------------


def test_filters():
    table = taxonomy.described()
    free = choose.matching(table, {"reference": "free"})
    assert {"objective/simpo", "objective/orpo"} <= set(free)
    assert "objective/dpo" not in free
    assert choose.matching(table, {"reference": "free", "feedback": "binary"}) == {}
    below = choose.matching(table, {"tag": "model/generation"})
    assert {"objective/wpo", "objective/ln-dpo"} <= set(below)
    assert choose.matching(table, {"tag": "model"}).keys() > below.keys()


@pytest.mark.parametrize(
    ("where", "nearest"), [({"refrence": "free"}, "reference"), ({"reference": "fre"}, "free"), ({"tag": "modle"}, "model")]
)
def test_unknown_filters_are_refused(where, nearest):
    with pytest.raises(UsageError, match=nearest):
        choose.matching(taxonomy.described(), where)


def test_places_hold_objectives_sources_and_hooks():
    found = choose.places()
    assert list(found) == list(taxonomy.TAGS)
    assert "hook/tr-dpo" in found["constraint/reference/moving"]
    assert "source/online-dpo" in found["learning/paradigm/online"]
    assert "objective/simpo" in found["model/generation/length"]
