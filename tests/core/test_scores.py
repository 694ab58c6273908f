"""Oracle of core/scores: float64 log_softmax, forward and every gradient, however the rows are chunked.

Bugs it is meant to catch: a wrong sign or a missing one-hot in the hand-written backward, chunks overlapping or left out,
gradients of a frozen head, a whole ``[N, V]`` tensor kept, float32 inside float64, batches assembled from the wrong answers.
"""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from metier.core import aux, models
from metier.core.batch import Labels, Lists, Pairs, Rated, Rollouts, Tokens
from metier.core.data.collate import collate
from metier.core.data.encode import Item
from metier.core.scores import _LinearLogps, class_logits, linear_logps, reference_scorer, score, token_logits

N, D, V = 11, 5, 13
ROW = 4 * V
"""Bytes of one row of logits, as ``chunk_bytes`` counts them."""


def problem(n=N, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    layer = nn.Linear(D, V, bias=bias, dtype=dtype)
    return torch.randn(n, D, dtype=dtype, requires_grad=True), layer, torch.randint(V, (n,))


def plain(h, layer, target, transform=lambda z: z):
    return transform(layer(h)).log_softmax(-1).gather(1, target[:, None])[:, 0]


def both(h, layer, target, chunk_bytes, transform=None):
    """Values and gradients of the chunked computation and of the plain one, for unequal incoming gradients."""
    g = torch.linspace(-1, 2, len(target), dtype=torch.float64)
    leaves = [h, *(p for p in layer.parameters() if p.requires_grad)]
    leaves = [x for x in leaves if x.requires_grad]
    found = []
    for out in (
        linear_logps(h, layer, target, chunk_bytes=chunk_bytes, transform=transform),
        plain(h, layer, target, transform or (lambda z: z)),
    ):
        assert out.shape == target.shape
        found.append([out, *torch.autograd.grad(out, leaves, g.to(out.dtype))])
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, N - 1, N, 100])
def test_values_and_gradients(rows, bias):
    for ours, theirs in zip(*both(*problem(bias=bias), rows * ROW), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [2, 100])
@pytest.mark.parametrize("trained", ["h", "weight", "bias", "weight and bias", "h and bias"])
def test_any_part_may_be_frozen(trained, rows):
    h, layer, target = problem()
    h.requires_grad_("h" in trained.split())
    layer.weight.requires_grad_("weight" in trained)
    layer.bias.requires_grad_("bias" in trained)
    for ours, theirs in zip(*both(h, layer, target, rows * ROW), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [2, 100])
def test_gradcheck(rows):
    h, layer, target = problem(n=5)

    def f(h, w, b):
        return _LinearLogps.apply(h, w, b, target, rows)

    assert torch.autograd.gradcheck(f, (h, layer.weight, layer.bias))


def test_transform():
    h, layer, target = problem()
    for ours, theirs in zip(*both(h, layer, target, 3 * ROW, lambda z: 2 * torch.tanh(z / 2)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_no_targets(kind):
    h, layer, target = problem(n=0, dtype=kind)
    out = linear_logps(h, layer, target)
    assert out.shape == (0,)
    assert out.dtype == kind
    out.sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight))
    assert h.grad.shape == (0, D)


def test_backward_may_run_twice():
    h, layer, target = problem()
    out = linear_logps(h, layer, target, chunk_bytes=100 * ROW)
    first, second = (torch.autograd.grad(out.sum(), layer.weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("frozen", [True, False])
def test_second_derivatives(frozen):
    """A Hessian-vector product, as curvature-aware optimizers and gradient penalties need it."""
    h, layer, target = problem()
    layer.weight.requires_grad_(not frozen)
    found = []
    for f in (linear_logps, plain):
        (g,) = torch.autograd.grad(f(h, layer, target).sum(), h, create_graph=True)
        leaves = [p for p in (h, layer.weight, layer.bias) if p.requires_grad]
        found.append(torch.autograd.grad((g**2).sum(), leaves))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [2, 100])
def test_bf16_autocast_is_as_good_as_the_plain_computation(rows):
    """Error against float64 no larger than twice that of a plain autocast linear layer and log_softmax."""
    torch.manual_seed(0)
    n, d, v = 40, 64, 50
    layer, h, target = nn.Linear(d, v), torch.randn(n, d), torch.randint(v, (n,))
    g, exact = torch.randn(n), None
    errors = []
    for kind, f in (("f64", None), ("ours", linear_logps), ("plain", plain)):
        leaf, head = h.clone().requires_grad_(), nn.Linear(d, v)
        head.load_state_dict(layer.state_dict())
        if kind == "f64":
            leaf, head = h.double().requires_grad_(), head.double()
            out = plain(leaf, head, target)
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = f(
                    leaf,
                    head,
                    target,
                    **({"chunk_bytes": rows * 4 * v} if f is linear_logps else {"transform": torch.Tensor.float}),
                )
            assert out.dtype == torch.float32
        out.backward(g.to(out.dtype))
        found = [out.detach().double(), leaf.grad.double(), head.weight.grad.double(), head.bias.grad.double()]
        exact = exact or found
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)])
    _, ours, theirs = errors
    for a, b in zip(ours, theirs, strict=True):
        assert a < 2 * b
        assert a < 0.02


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor made by any operation, in elements."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.size = max(self.size, t.numel())
        return out


@pytest.mark.parametrize("frozen", [True, False])
def test_no_tensor_larger_than_a_chunk(frozen):
    torch.manual_seed(0)
    n, d, v, rows = 500, 4, 200, 20
    layer, target = nn.Linear(d, v).requires_grad_(not frozen), torch.randint(v, (n,))
    h = torch.randn(n, d, requires_grad=True)
    kept = []
    with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        linear_logps(h, layer, target, chunk_bytes=rows * 4 * v).sum().backward()
    assert seen.size <= rows * v
    assert max(kept) <= n * d


def test_all_probabilities_are_kept_only_when_they_fit_in_one_chunk():
    h, layer, target = problem()
    for rows, expected in ((N, [N * V]), (N - 1, [])):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.append(t.shape) or t, lambda t: t):
            linear_logps(h, layer, target, chunk_bytes=rows * ROW)
        assert [s.numel() for s in kept if s == (N, V)] == expected


def test_a_head_with_hooks_or_of_another_class_is_called():
    h, layer, target = problem()
    seen = []
    handle = layer.register_forward_hook(lambda m, args, out: seen.append(1) or out * 2)
    torch.testing.assert_close(linear_logps(h, layer, target), plain(h, layer, target), rtol=0, atol=1e-12)
    assert seen == [1, 1]
    handle.remove()
    wrapped = nn.Sequential(layer)
    torch.testing.assert_close(linear_logps(h, wrapped, target), plain(h, layer, target), rtol=0, atol=1e-12)


# --- batches -------------------------------------------------------------------------------------------------


def ids(*values):
    return np.array(values, dtype=np.int32)


def item(prompt, *answers, label=None, extra=None):
    loss = np.ones(len(prompt), bool) if not answers else np.zeros(len(prompt), bool)
    masks = tuple(np.ones(len(a), bool) for a in answers)
    return Item(ids(*prompt), loss, tuple(ids(*a) for a in answers), masks, "x", label, extra or {})


@pytest.fixture(scope="module")
def model():
    return models.load("lab/llama-50k", seed=1).model.double()


def sums(model, prompt, *answers):
    """Summed log-probability of each answer, computed alone from the model's own logits."""
    out = []
    for a in answers:
        z = model(input_ids=torch.tensor([[*prompt, *a]])).logits.log_softmax(-1)[0]
        out.append(float(sum(z[len(prompt) - 1 + i, t] for i, t in enumerate(a)).detach()))
    return out


def test_tokens(model):
    batch = score(model, collate([item([5, 6, 7, 8]), item([9, 10])], pad_id=3), Tokens)
    z = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.log_softmax(-1)[0]
    expected = [z[0, 6], z[1, 7], z[2, 8], model(input_ids=torch.tensor([[9]])).logits.log_softmax(-1)[0, 0, 10]]
    torch.testing.assert_close(batch.logps, torch.stack(expected), rtol=0, atol=1e-10)
    assert batch.sequence.tolist() == [0, 0, 0, 1]
    assert batch.weights.tolist() == [1, 1, 1, 1]
    assert batch.logits is None


def test_weights_of_tokens_reach_their_targets(model):
    weighted = item([5, 6, 7], extra={"weight": np.array([9, 0.5, 2], np.float64)})
    batch = score(model, collate([weighted, item([8, 9])], pad_id=3), Tokens)
    assert batch.weights.tolist() == [0.5, 2, 1]


def test_pairs(model):
    made = [item([5, 6], [7, 8, 9], [10], label=0.5), item([11], [12], [13, 14], label=0.25)]
    batch = score(model, collate(made, pad_id=3), Pairs)
    (a, b), (c, d) = sums(model, [5, 6], [7, 8, 9], [10]), sums(model, [11], [12], [13, 14])
    torch.testing.assert_close(batch.chosen_logps, torch.tensor([a, c]).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(batch.rejected_logps, torch.tensor([b, d]).double(), rtol=0, atol=1e-6)
    assert batch.chosen_len.tolist() == [3, 1]
    assert batch.rejected_len.tolist() == [1, 2]
    assert batch.margin.tolist() == [0.5, 0.25]


def test_rated(model):
    made = [item([5, 6], [7, 8], label=True), item([9], [10], label=False)]
    batch = score(model, collate(made, pad_id=3), Rated)
    expected = [*sums(model, [5, 6], [7, 8]), *sums(model, [9], [10])]
    torch.testing.assert_close(batch.logps, torch.tensor(expected).double(), rtol=0, atol=1e-6)
    assert batch.label.dtype == torch.bool
    assert batch.label.tolist() == [True, False]
    assert batch.length.tolist() == [2, 1]


def test_ragged_lists(model):
    answers = [[7], [8, 9], [10]], [[11, 12], [13]]
    made = [item([5, 6], *answers[0], label=(1.0, 2.0, 3.0)), item([4], *answers[1], label=(0.5, 0.1))]
    batch = score(model, collate(made, pad_id=3), Lists)
    assert batch.present.tolist() == [[True, True, True], [True, True, False]]
    expected = [sums(model, [5, 6], *answers[0]), [*sums(model, [4], *answers[1]), 0.0]]
    torch.testing.assert_close(batch.logps, torch.tensor(expected).double(), rtol=0, atol=1e-6)
    assert batch.length.tolist() == [[1, 2, 1], [2, 1, 0]]
    torch.testing.assert_close(batch.score, torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.1, 0.0]]))


def test_rollouts(model):
    old = np.array([0, 0, -1.5, -2.5, -3.5])
    made = item([5, 6], [7, 8], [9], label=(1.0, 0.0), extra={"old_logps": old})
    batch = score(model, collate([made], pad_id=3), Rollouts)
    assert batch.old_logps.tolist() == [-1.5, -2.5, -3.5]
    assert batch.sequence.tolist() == [0, 0, 1]
    assert batch.reward.tolist() == [[1.0, 0.0]]
    on_policy = score(model, collate([replace(made, extra={})], pad_id=3), Rollouts)
    assert torch.equal(on_policy.old_logps, on_policy.logps)
    assert not on_policy.old_logps.requires_grad


def test_logits_and_reference(model):
    other = models.load("lab/llama-50k", seed=2).model.double()
    rows = collate([item([5, 6, 7]), item([8, 9])], pad_id=3)
    calls = []
    scorer = reference_scorer(other, nullcontext)

    def reference(layout, logits):
        calls.append(logits)
        return scorer(layout, logits)

    batch = score(model, rows, Tokens, reference=reference, needs=frozenset({"logits", "reference"}))
    assert calls == [True]  # one pass gives both
    torch.testing.assert_close(batch.logits, token_logits(model, rows))
    torch.testing.assert_close(batch.ref_logits, token_logits(other, rows))
    torch.testing.assert_close(batch.ref_logps, score(other, rows, Tokens).logps.detach())
    torch.testing.assert_close(batch.logps, score(model, rows, Tokens).logps)
    assert not batch.ref_logps.requires_grad
    alone = score(model, rows, Tokens, reference=reference, needs=frozenset({"reference"}))
    torch.testing.assert_close(alone.ref_logps, batch.ref_logps)
    cached = replace(rows, reference=torch.arange(3.0))
    assert torch.equal(score(model, cached, Tokens, needs=frozenset({"reference"})).ref_logps, torch.arange(3.0))


def test_cached_reference_of_answers_stays_per_answer(model):
    rows = collate([item([5, 6], [7, 8], [9])], pad_id=3)
    batch = score(model, replace(rows, reference=torch.tensor([-3.0, -4.0])), Pairs, needs=frozenset({"reference"}))
    assert (batch.ref_chosen_logps.tolist(), batch.ref_rejected_logps.tolist()) == ([-3.0], [-4.0])


def test_the_reference_pass_evaluates_and_leaves_no_trace():
    """Dropout off inside, modes put back, and what modules add to the loss there is thrown away."""

    class Noisy(nn.Module):
        def forward(self, x):
            aux.add("noise", torch.tensor(1.0))
            return nn.functional.dropout(x, 0.5, self.training)

    model = models.load("lab/llama-50k", seed=1).model
    model.model.norm = nn.Sequential(model.model.norm, Noisy())
    model.train()
    model.model.layers[0].eval()
    rows = collate([item([5, 6, 7])], pad_id=3)
    with aux.collect(rows) as found:
        reference = reference_scorer(model, nullcontext)
        assert torch.equal(reference(rows, False), reference(rows, False))
        assert found == {}
        assert aux.layout() is rows
    assert model.training
    assert model.model.norm[1].training
    assert not model.model.layers[0].training


@pytest.mark.parametrize("name", ["lab/bert-1m", "lab/llama-50k"])
def test_class_logits_do_not_depend_on_padding(name):
    bundle = models.load(name, task="classify", num_labels=3, seed=1)
    model = bundle.model.double().eval()
    made = [item([5, 6, 7, 8, 9, 10], label=1), item([11, 12], label=0), item([7], label=2)]
    batch = score(model, collate(made, pad_id=bundle.tokenizer.pad_token_id), Labels)
    alone = [score(model, collate([i], pad_id=3), Labels).logits[0] for i in made]
    torch.testing.assert_close(batch.logits, torch.stack(alone), rtol=0, atol=1e-10)
    expected = model(input_ids=torch.tensor([[11, 12]])).logits[0]
    torch.testing.assert_close(batch.logits[1], expected, rtol=0, atol=1e-10)
    assert batch.label.tolist() == [1, 0, 2]
    mapped = class_logits(model, collate(made, pad_id=3), embed=lambda e: e)
    torch.testing.assert_close(mapped, batch.logits, rtol=0, atol=1e-10)


def test_segment_ids_reach_models_that_have_them():
    bert = models.load("lab/bert-1m", task="classify", seed=1).model.double().eval()
    llama = models.load("lab/llama-50k", task="classify", seed=1).model.double().eval()
    segments = {"token_type_ids": np.array([0, 0, 1, 1])}
    pair, single = item([5, 6, 7, 8], label=0, extra=segments), item([5, 6, 7, 8], label=0)
    got = class_logits(bert, collate([pair, item([9], label=1)], pad_id=3))
    expected = bert(input_ids=torch.tensor([[5, 6, 7, 8]]), token_type_ids=torch.tensor([[0, 0, 1, 1]])).logits
    torch.testing.assert_close(got[:1], expected, rtol=0, atol=1e-10)
    assert not torch.allclose(got[0], class_logits(bert, collate([single], pad_id=3))[0])
    assert torch.equal(*(class_logits(llama, collate([i], pad_id=3)) for i in (pair, single)))
