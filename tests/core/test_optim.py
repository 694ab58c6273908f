import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import metier.optimizers
from metier.core import part, shards, stacking
from metier.core.errors import MetierError, UsageError
from metier.core.optim import Optimizer, Rule, Step, build, common_options, default_lr
from metier.core.part import Built


@dataclass(frozen=True, kw_only=True)
class Average(Rule):
    """Direction: the sum of gradients."""

    elementwise = True
    default_lr = 0.5

    def init(self, p):
        return {"sum": torch.zeros_like(p)}

    def update(self, g, p, state, step):
        return state["sum"].add_(g)


@dataclass(frozen=True, kw_only=True)
class Columns(Rule):
    """A matrix method with state of three shapes, that rebinds its state instead of changing it."""

    matrices = True

    def init(self, p):
        assert p.ndim == 2
        return {
            "gram": p.new_zeros(p.shape[-1], p.shape[-1]),
            "count": torch.zeros(()),
            "m": torch.zeros_like(p),
        }

    def update(self, g, p, state, step):
        assert g.ndim == 3
        state["gram"] = state["gram"] + g.mT @ g
        state["count"] += 1
        state["m"].add_(g)
        return state["m"] @ state["gram"] + p * state["count"][:, None, None]


@dataclass(frozen=True, kw_only=True)
class TwoSided(Rule):
    """Zeroth order, for the tests: one random direction, two evaluations."""

    def step(self, closure, params, states, *, lr, weight_decay, t):
        losses = []
        for sign in (1, -2, 1):
            source = torch.Generator().manual_seed(t)
            for p in params:
                p.add_(torch.randn(p.shape, generator=source), alpha=sign * 1e-3)
            losses.append(closure(backward=False))
        slope = (losses[0] - losses[1]) / 2e-3
        source = torch.Generator().manual_seed(t)
        for p, rate, decay in zip(params, lr, weight_decay, strict=True):
            p.mul_(1 - rate * decay).add_(torch.randn(p.shape, generator=source), alpha=-rate * slope)
        return losses[0]


@dataclass(frozen=True, kw_only=True)
class TwoGradients(Rule):
    """Needs gradients at two points: an extra-gradient step, for the tests."""

    def step(self, closure, params, states, *, lr, weight_decay, t):
        start = [p.clone() for p in params]
        loss = closure(backward=True)
        for p, rate in zip(params, lr, strict=True):
            p.sub_(p.grad, alpha=rate)
        closure(backward=True)
        for p, s, rate in zip(params, start, lr, strict=True):
            p.copy_(s - rate * p.grad)
        return loss


class Tiny(nn.Module):
    """Shaped like a language model of transformers."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.positions = nn.Embedding(4, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.conv = nn.Conv1d(6, 6, 3)
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head


def built(rule):
    return Built("optimizer/test", part.Card("optimizer/test", ""), rule, {})


def groups_of(optimizer):
    return {n: g for g in optimizer.param_groups for n in g["param_names"]}


# --- the step ---------------------------------------------------------------------------------------------


def test_the_update_decays_then_moves():
    p = nn.Parameter(torch.tensor([2.0, -4.0]))
    optimizer = Optimizer([p], Average(), lr=0.1, weight_decay=0.5)
    for wanted in ([2 * 0.95 - 0.1, -4 * 0.95 - 0.2], None):
        p.grad = torch.tensor([1.0, 2.0])
        optimizer.step()
        if wanted:
            torch.testing.assert_close(p.data, torch.tensor(wanted))
    second = [(2 * 0.95 - 0.1) * 0.95 - 0.2, (-4 * 0.95 - 0.2) * 0.95 - 0.4]
    torch.testing.assert_close(p.data, torch.tensor(second))


def test_a_closure_in_torchs_form():
    p = nn.Parameter(torch.ones(3))
    optimizer = Optimizer([p], Average(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    torch.testing.assert_close(p.data, torch.full((3,), 0.8))


def test_sparse_gradients_are_refused_by_name():
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = Optimizer(table.named_parameters(prefix="table"), Average(), lr=0.1)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UsageError, match=r"table\.weight is sparse"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_only_real_floating_parameters(dtype):
    p = torch.zeros(3, dtype=dtype)
    with pytest.raises(UsageError, match=r"gate is torch\."):
        Optimizer([("gate", p)], Average(), lr=0.1)


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"lr": 0.0}, {"lr": float("nan")}, {"lr": 0.1, "weight_decay": -1.0}])
def test_settings_out_of_range(options):
    with pytest.raises(UsageError, match="must be (above|at least) 0"):
        Optimizer([nn.Parameter(torch.zeros(2))], Average(), **options)


def test_an_unknown_key_of_a_group_is_refused():
    with pytest.raises(UsageError, match="Did you mean 'weight_decay'"):
        Optimizer([{"params": [nn.Parameter(torch.zeros(2))], "weigth_decay": 0.1}], Average(), lr=0.1)


def test_half_precision_is_computed_in_float32():
    """1 - 1e-3 is not a bfloat16: decay and step must be rounded together, once."""
    p = nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    optimizer = Optimizer([p], Average(), lr=1e-3, weight_decay=1.0)
    p.grad = torch.full((4,), -1.0, dtype=torch.bfloat16)
    optimizer.step()
    assert torch.equal(p.data, torch.full((4,), 1.0, dtype=torch.bfloat16))
    assert optimizer.state[p]["sum"].dtype == torch.float32


def test_state_in_bf16_keeps_the_mean():
    """An average that moves by less than half a unit in the last place moves nevertheless, on average."""
    p = nn.Parameter(torch.zeros(4096))
    optimizer = Optimizer([p], Average(), lr=1e-12, state_dtype="bf16")
    p.grad = torch.ones(4096)
    optimizer.step()
    p.grad = torch.full((4096,), 1e-3)
    for _ in range(100):
        optimizer.step()
    stored = optimizer.state[p]["sum"]
    assert stored.dtype == torch.bfloat16
    assert stored.float().mean().item() == pytest.approx(1.1, abs=0.005)
    # 100 independent draws: binomial spread, where the same draw at every step would give 0.26.
    assert stored.float().std().item() == pytest.approx(2**-7 * (100 * 0.128 * 0.872) ** 0.5, rel=0.1)
    assert torch.ones(()).bfloat16() + torch.tensor(1e-3).bfloat16() == 1.0


def test_stochastic_rounding_keeps_what_bf16_can_hold_and_what_is_not_finite():
    source = torch.Generator().manual_seed(0)
    exact = torch.tensor([0.0, -1.0, 1.5, float("inf"), float("-inf"), 3.0e38])
    torch.testing.assert_close(shards.stochastic_bf16(exact, source)[:5].float(), exact[:5])
    assert shards.stochastic_bf16(torch.tensor([float("nan")]), source).isnan().all()


def test_portions_are_bounded(monkeypatch):
    monkeypatch.setattr(stacking, "PORTION", 10)
    sizes = [4, 4, 4, 30, 1, 9, 1]
    found = list(stacking.buckets(sizes, lambda s: s == 30, lambda s: s))
    assert found == [[4, 4], [4, 1], [9, 1], [30]]


def test_portions_do_not_change_the_result(monkeypatch):
    def run():
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(3, 4)) for _ in range(5)]
        optimizer = Optimizer(params, Columns(), lr=1e-3)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(3, 4)
            optimizer.step()
        return params

    whole = run()
    monkeypatch.setattr(stacking, "PORTION", 24)
    torch.testing.assert_close(run(), whole)


def test_stacks_hold_states_of_any_shape_and_rebound_ones():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(3, 4)) for _ in range(3)]
    before = [p.detach().clone() for p in params]
    optimizer = Optimizer(params, Columns(), lr=0.1)
    grads = [torch.randn(3, 4) for _ in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()
    optimizer.step()
    for p, g, start in zip(params, grads, before, strict=True):
        first = start - 0.1 * (g @ (g.T @ g) + start)
        second = first - 0.1 * (2 * g @ (2 * g.T @ g) + 2 * first)
        torch.testing.assert_close(p.data, second)
        assert optimizer.state[p]["count"].item() == 2


# --- closure rules ----------------------------------------------------------------------------------------


def test_a_rule_that_evaluates_the_loss_itself():
    p = nn.Parameter(torch.ones(5))
    optimizer = Optimizer([p], TwoSided(), lr=0.02)
    calls = []

    def closure(backward=False):
        calls.append(backward)
        assert torch.is_grad_enabled() == backward
        return p.square().sum().item()

    first = optimizer.step(closure)
    assert first == pytest.approx(5.0, rel=0.1)
    assert calls == [False, False, False]
    for _ in range(60):
        last = optimizer.step(closure)
    assert last < 0.5 * first
    assert optimizer.state[p]["step"] == 61
    with pytest.raises(UsageError, match="closure"):
        optimizer.step()


def test_such_a_rule_takes_a_closure_in_torchs_form_and_keeps_groups_apart():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Optimizer([{"params": [p]}, {"params": [q], "lr": 0.0}], TwoGradients(), lr=0.1)

    def closure():
        loss = (p.square() + q.square()).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0
    torch.testing.assert_close(p.data, torch.full((2,), 1 - 0.1 * 2 * 0.8))
    torch.testing.assert_close(q.data, torch.ones(2))
    zeroth = Optimizer([{"params": [p], "lr": 0.0}], TwoSided(), lr=1.0)
    zeroth.step(closure)
    assert p.grad is None


# --- groups -----------------------------------------------------------------------------------------------


def test_roles():
    roles = {n: g["role"] for n, g in groups_of(build(Tiny(), built(Average()), weight_decay=0.1)).items()}
    assert roles == {
        "embed.weight": "embeddings", "positions.weight": "embeddings", "lm_head.weight": "head",
        "layers.0.weight": "matrices", "layers.1.weight": "matrices", "conv.weight": "tensors",
        "layers.0.bias": "rest", "layers.1.bias": "rest", "conv.bias": "rest",
        "norm.weight": "rest", "norm.bias": "rest",
    }  # fmt: skip


def test_a_tied_head_is_an_embedding_and_is_there_once():
    groups = groups_of(build(Tiny(tied=True), built(Average())))
    assert groups["embed.weight"]["role"] == "embeddings"
    assert "lm_head.weight" not in groups


def test_frozen_parameters_are_left_out():
    model = Tiny()
    model.embed.requires_grad_(False)
    assert "embed.weight" not in groups_of(build(model, built(Average())))
    with pytest.raises(UsageError, match="no parameter is trainable"):
        build(model.requires_grad_(False), built(Average()))


def test_a_classifier_of_transformers_has_its_head_found():
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    small = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_labels": 3,
    }
    bert = BertForSequenceClassification(BertConfig(vocab_size=20, **small))
    found = {n: g["role"] for n, g in groups_of(build(bert, built(Average()))).items()}
    assert [n for n, r in found.items() if r == "head"] == ["classifier.weight"]
    assert found["bert.embeddings.position_embeddings.weight"] == "embeddings"
    assert found["bert.encoder.layer.0.attention.self.query.weight"] == "matrices"
    roberta = RobertaForSequenceClassification(RobertaConfig(vocab_size=20, **small))
    found = {n: g["role"] for n, g in groups_of(build(roberta, built(Average()))).items()}
    assert [n for n, r in found.items() if r == "head"] == ["classifier.out_proj.weight"]
    assert found["classifier.dense.weight"] == "matrices"


def test_defaults_and_overrides():
    overrides = {
        "layers.*": {"lr_scale": 0.1},
        "head": {"lr": 7.0, "weight_decay": 0.0},
        "norm.*": {"weight_decay": 0.3},
    }
    groups = groups_of(build(Tiny(), built(Average()), weight_decay=0.1, groups=overrides))
    settings = {n: (g["lr"], g["weight_decay"]) for n, g in groups.items()}
    assert settings["embed.weight"] == (0.5, 0.1)
    assert settings["layers.0.weight"] == (pytest.approx(0.05), 0.1)
    assert settings["layers.0.bias"] == (pytest.approx(0.05), 0.0)
    assert settings["lm_head.weight"] == (7.0, 0.0)
    assert settings["norm.weight"] == (0.5, 0.3)
    assert all(g["initial_lr"] == g["lr"] for g in groups.values())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layrs.0.weight": {"lr": 1.0}}, "(?s)no trainable parameter matches.*layers.0.weight"),
        ({"layers.*": {"learning_rate": 1.0}}, "(?s)learning_rate.*takes lr, lr_scale, weight_decay"),
        ({"layers.*": {"lr": -1.0}}, "at least 0"),
        ({"layers.*": {"lr": 1.0, "lr_scale": 2.0}}, "not both"),
        ({"layers.*": {"lr": 1.0}, "*.weight": {"lr": 1.0}}, "layers.0.weight is matched by"),
    ],
)
def test_overrides_that_are_refused(overrides, message):
    with pytest.raises(UsageError, match=message):
        build(Tiny(), built(Average()), groups=overrides)


def test_a_matrix_method_leaves_the_rest_to_its_fallback():
    optimizer = build(Tiny(), built(Columns()), lr=1e-2)
    roles = {n: g["role"] for n, g in groups_of(optimizer).items()}
    assert [n for n, role in roles.items() if role == "matrices"] == ["layers.0.weight", "layers.1.weight"]
    ratio = default_lr(optimizer.rule_of("embeddings")) / default_lr(Columns())
    assert groups_of(optimizer)["embed.weight"]["lr"] == pytest.approx(1e-2 * ratio)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    by_name = dict(optimizer.named())
    assert set(optimizer.state[by_name["layers.0.weight"]]) == {"gram", "count", "m", "step"}
    assert set(optimizer.state[by_name["embed.weight"]]) == {"m", "v", "step"}


def test_a_mixed_group_is_split_with_the_learning_rate_of_the_fallback():
    p, q = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
    optimizer = Optimizer([{"params": [q, p], "lr": 0.1}], Columns(), lr=1.0, weight_decay=0.2)
    first, second = optimizer.param_groups
    assert first["params"] == [p]
    assert (first["lr"], first["role"]) == (0.1, "matrices")
    assert second["params"] == [q]
    assert second["lr"] == second["initial_lr"] == pytest.approx(0.1 * 3e-4 / 1e-3)
    assert second["role"] == "rest"
    assert second["weight_decay"] == 0.2
    optimizer.add_param_group({"params": nn.Parameter(torch.ones(2, 2)), "role": "embeddings", "lr": 0.5})
    assert optimizer.param_groups[-1]["lr"] == 0.5


def test_names_do_not_depend_on_torch_compile():
    model = torch.compile(Tiny(), backend="eager")
    assert "layers.0.weight" in groups_of(build(model, built(Average())))


def test_common_options_are_the_signature():
    assert list(part.options(common_options)) == ["lr", "weight_decay", "groups", "state_dtype"]


# --- state ------------------------------------------------------------------------------------------------


def trained(state_dtype=None, named=True):
    torch.manual_seed(0)
    p, q = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4, dtype=torch.bfloat16))
    params = [("a.weight", p), ("b.bias", q)] if named else [p, q]
    optimizer = Optimizer(params, Average(), lr=0.1, state_dtype=state_dtype)
    p.grad, q.grad = torch.randn(3, 2), torch.randn(4, dtype=torch.bfloat16)
    optimizer.step()
    return optimizer


def test_the_full_state_is_by_name_or_index():
    assert list(trained().full_state_dict()) == ["a.weight", "b.bias"]
    full = trained(named=False).full_state_dict()
    assert list(full) == ["0", "1"]
    assert full["0"]["step"] == 1
    assert full["1"]["sum"].dtype == torch.float32


def test_the_full_state_is_a_copy_and_replaces_what_was_there():
    optimizer = trained()
    saved = optimizer.full_state_dict()
    kept = copy.deepcopy(saved)
    optimizer.step()
    torch.testing.assert_close(saved, kept)
    del saved["b.bias"]
    optimizer.load_full_state_dict(saved)
    assert list(optimizer.full_state_dict()) == ["a.weight"]
    optimizer.step()
    torch.testing.assert_close(saved["a.weight"]["sum"], kept["a.weight"]["sum"])
    with pytest.raises(MetierError, match="gone"):
        optimizer.load_full_state_dict({"gone": {"step": 1}})


def test_loading_keeps_the_dtype_of_the_state_not_that_of_the_parameter():
    optimizer = trained()
    fresh = trained()
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert fresh.full_state_dict()["b.bias"]["sum"].dtype == torch.float32


def test_copies_and_pickles_keep_the_rule(tmp_path):
    optimizer = trained(state_dtype="bf16")
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.rule == optimizer.rule
        assert other.state_dtype == torch.bfloat16
        other.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    fresh = trained(state_dtype="bf16")
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_bytes():
    assert trained().state_bytes() == 4 * 10
    assert trained(state_dtype="bf16").state_bytes() == 2 * 10


# --- alone ------------------------------------------------------------------------------------------------


def test_every_optimizer_is_a_torch_optimizer():
    assert "Lion" in dir(metier.optimizers)
    p = nn.Parameter(torch.ones(3))
    optimizer = metier.optimizers.Lion([p], lr=1e-3, weight_decay=0.1, beta1=0.8)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.rule.beta1 == 0.8
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert metier.optimizers.Lion([p]).param_groups[0]["lr"] == default_lr(optimizer.rule)
    with pytest.raises(UsageError, match="beta1"):
        metier.optimizers.Lion([p], beta_1=0.8)
    with pytest.raises(UsageError, match="Give the model"):
        metier.optimizers.Lion([p], groups={"*": {"lr": 1.0}})
    with pytest.raises(AttributeError, match="metier list optimizer"):
        metier.optimizers.Lyon


def test_a_model_is_grouped():
    groups = groups_of(metier.optimizers.Lion(Tiny(), weight_decay=0.1, groups={"head": {"lr": 1.0}}))
    assert groups["norm.weight"]["weight_decay"] == 0.0
    assert groups["lm_head.weight"]["lr"] == 1.0


# --- what a rule is told, and what it must not be given --------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Told(Rule):
    """Records the steps it is given."""

    default_lr = 0.5
    sample_every = 3

    def update(self, g, p, state, step):
        SEEN.append(step)
        return None if step.t == 2 else torch.ones_like(p)


SEEN: list[Step] = []


def test_a_rule_is_told_names_rates_and_the_loop_s_figures():
    SEEN.clear()
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    optimizer = Optimizer([("a", p), ("b", q)], Told(), lr=0.1, weight_decay=0.2)
    optimizer.sampler = lambda: (7, {id(q): torch.full((3,), 5.0)})
    optimizer.observe(loss=1.5, progress=0.25)
    optimizer.param_groups[0]["lr"] = 0.05
    for t in range(4):
        p.grad, q.grad = torch.ones(2), torch.ones(3)
        optimizer.step()
        if t == 1:  # no direction: neither movement nor decay
            torch.testing.assert_close(q, torch.full((3,), -0.05))
    first, second = SEEN[:2]
    assert (first.names, second.names) == (("a",), ("b",))
    assert (first.t, first.lr, first.peak, first.weight_decay) == (1, 0.05, 0.1, 0.2)
    assert (first.loss, first.progress) == (1.5, 0.25)
    assert first.sampled == (None,)
    assert second.sampled is not None
    assert second.sampled[0] is not None
    assert torch.equal(second.sampled[0], torch.full((3,), 5.0))
    assert second.samples == 7
    assert [s.sampled is not None for s in SEEN[1::2]] == [True, False, False, True]


def test_a_rule_that_wants_sampled_labels_says_so_when_there_are_none():
    p = nn.Parameter(torch.zeros(2))
    optimizer = Optimizer([p], Told(), lr=0.1)
    p.grad = torch.ones(2)
    with pytest.raises(UsageError, match="Told needs gradients on labels sampled"):
        optimizer.step()


def test_decay_comes_after_the_update_where_a_rule_says_so():
    @dataclass(frozen=True, kw_only=True)
    class After(Average):
        decay_after = True

    for rule, expected in ((Average(), 1 * 0.9 - 0.5 * 2), (After(), (1 - 0.5 * 2) * 0.9)):
        p = nn.Parameter(torch.ones(()))
        optimizer = Optimizer([p], rule, lr=0.5, weight_decay=0.2)
        p.grad = torch.tensor(2.0)
        optimizer.step()
        assert p.item() == pytest.approx(expected, abs=1e-6)


def test_roles_can_have_rules_of_their_own_with_learning_rates_in_proportion():
    @dataclass(frozen=True, kw_only=True)
    class Mixed(Average):
        def for_role(self, role):
            return Told() if role == "head" else self

    optimizer = build(Tiny(), built(Mixed()), lr=0.25)
    assert optimizer.rule_of("head") == Told()
    assert optimizer.rule_of("matrices") is optimizer.rule_of("rest")
    assert {g["lr"] for g in optimizer.param_groups} == {0.25}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused_by_name_before_anything_changes(bad):
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = Optimizer([("clean", p), ("poisoned", q)], Average(), lr=0.1)
    p.grad, q.grad = torch.ones(2), torch.tensor([1.0, bad, 1.0])
    with pytest.raises(MetierError, match="the gradient of poisoned is not finite"):
        optimizer.step()
    assert torch.equal(p, torch.ones(2))
    assert not optimizer.state
    optimizer.check_finite = False
    optimizer.step()
    assert not torch.isfinite(q).all()


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "transformer.wte.weight", "lm_head.weight"])
def test_embeddings_without_a_role_are_refused_by_a_matrix_method(name):
    p = nn.Parameter(torch.ones(4, 3))
    with pytest.raises(UsageError, match=rf"{name} looks like an embedding"):
        Optimizer([(name, p)], Columns(), lr=0.1)
    assert Optimizer([{"params": [(name, p)], "role": "embeddings"}], Columns(), lr=0.1).param_groups[0]["role"] == "embeddings"
    assert Optimizer([{"params": [(name, p)], "role": "matrices"}], Columns(), lr=0.1)


def test_what_is_no_matrix_is_refused_in_a_group_of_matrices():
    with pytest.raises(UsageError, match=r"bias has shape \[3\]; Columns moves matrices only"):
        Optimizer([{"params": [("bias", nn.Parameter(torch.ones(3)))], "role": "matrices"}], Columns(), lr=0.1)
