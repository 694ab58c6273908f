"""Oracle of model/multi-token-prediction: the chain written out for one sequence at a time, and the card's identities.

Bugs it is meant to catch: targets or embeddings off by one, predictions over the border of a document or from one answer into
another, depths that see later tokens or the garbage before a sequence's k-th token, a detached trunk, the wrong weight, losses in
evaluation, a copied model that calls the original's blocks, drafts that change the output.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from metier.core import aux, models, part
from metier.core.data.collate import collate
from metier.core.data.encode import Item
from metier.core.errors import UsageError
from metier.core.scores import token_logps
from metier.parts.model.multi_token_prediction import speculate
from metier.testing import check_part
from metier.testing._tiny import tiny

TRANSFORMS = {
    "plain": [],
    "mla": [{"mla": {"kv_lora_rank": 12}}],
    "moe": [{"deepseek-moe": {"n_routed": 4, "top_k": 2, "dense_first": 0}}],
}


def load(name="lab/llama-50k", before="plain", seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    model = models.load(name, seed=seed).model
    for ref in [*TRANSFORMS[before], {"multi-token-prediction": options}]:
        model = part.build("model", ref).obj(model)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.add_(0.2 * torch.randn_like(p)) if "norm" in n or "mtp" in n or "self_attn" in n else None
    return model.to(dtype)


def sequences(seed, *lengths):
    g = np.random.default_rng(seed)
    return [g.integers(5, 90, n).astype(np.int32) for n in lengths]


def text(ids, loss=None):
    return Item(ids, np.ones(len(ids), bool) if loss is None else np.asarray(loss, bool), id="x")


def losses(model, layout):
    """Of every depth, and the auxiliary losses of a training pass."""
    found = []
    original = type(model.mtp).losses
    type(model.mtp).losses = lambda self, *a: found.append(original(self, *a)) or found[-1]
    try:
        with aux.collect(layout) as extra:
            token_logps(model.train(), layout)
    finally:
        type(model.mtp).losses = original
    return found[-1], extra


def rms(x, norm, eps):
    return norm.weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def chain(model, ids):
    """Logits of every depth for one sequence ``ids [T]``: entry k - 1 is ``[T - k, V]``."""
    ids = torch.as_tensor(ids).long().unsqueeze(0)
    eps, backbone = model.config.rms_norm_eps, models.backbone(model)
    h = backbone(input_ids=ids).last_hidden_state
    found = []
    for k in range(1, model.mtp.count + 1):
        depth = model.mtp.get_submodule(str(k))
        n = ids.shape[1] - k
        if n < 1:
            break
        joined = torch.cat([rms(model.get_input_embeddings()(ids[:, k:]), depth.enorm, eps), rms(h[:, :n], depth.hnorm, eps)], -1)
        angles = backbone.rotary_emb(h, position_ids=torch.arange(n).unsqueeze(0))
        h = depth.block(joined @ depth.eh_proj.weight.T, attention_mask=None, position_embeddings=angles)
        found.append((rms(h, depth.norm, eps) @ models.head(model).weight.T)[0])
    return found


def expected(model, items):
    """Mean loss of each depth over all sequences ``(ids, which carry loss)``."""
    model.eval()
    sums = [[] for _ in range(model.mtp.count)]
    for ids, loss in items:
        for k, logits in enumerate(chain(model, ids), 1):
            for t in range(len(ids) - k - 1):
                if loss[t + k + 1]:
                    sums[k - 1].append(-logits[t].log_softmax(-1)[int(ids[t + k + 1])])
    return [torch.stack(s).mean() for s in sums]


def test_contract():
    check_part("model/multi-token-prediction")


# --- the loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["plain", "mla", "moe"])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_is_the_chain_of_each_sequence(before, packed):
    model = load(before=before, depth=3, weight=0.6)
    parts = sequences(0, 9, 4, 7, 3)  # the last one is too short for the third depth
    layout = collate([text(p) for p in parts], pad_id=3, rows=[[0, 1], [2, 3]] if packed else None)
    got, extra = losses(model, layout)
    want = expected(model, [(p, [True] * len(p)) for p in parts])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(extra["mtp"], 0.6 / 3 * sum(want), atol=1e-6, rtol=1e-6)
    wanted = [model.get_input_embeddings().weight, *model.mtp.parameters(), *models.blocks(model)[-1].self_attn.parameters()]
    grads = torch.autograd.grad(extra["mtp"], wanted), torch.autograd.grad(0.6 / 3 * sum(want), wanted)
    for ours, theirs in zip(*grads, strict=True):  # embedding and head are one tensor here: both ways into it count
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["lab/llama-300k", "lab/qwen2-1m"])
def test_prompts_without_loss_and_shared_prompts(name, attention):
    model = load(name, depth=2, dtype=torch.float64)
    model.set_attn_implementation(attention)
    model.to(torch.float64 if attention == "sdpa" else torch.float32)
    prompt, a, b = sequences(1, 4, 3, 5)
    alone = [(np.concatenate([prompt, x]), [False] * 4 + [True] * len(x)) for x in (a, b)]
    layouts = [
        collate([text(*pair) for pair in alone], pad_id=3),
        collate([text(*pair) for pair in alone], pad_id=3, rows=[[0, 1]]),
        collate([Item(prompt, np.zeros(4, bool), (a, b), (np.ones(3, bool), np.ones(5, bool)), "x")], pad_id=3),
    ]
    want = expected(model, alone)
    for layout in layouts:
        torch.testing.assert_close(losses(model, layout)[0], want, atol=2e-5, rtol=2e-5)


def test_weights_of_tokens_count():
    model = load()
    layout = collate([text(sequences(0, 6)[0])], pad_id=3)
    weighted = replace(layout, weight=torch.tensor([9.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    logits = chain(model, layout.input_ids[0])[0]
    want = -logits[1].log_softmax(-1)[layout.input_ids[0, 3]] / 4  # four predictions, of which one has weight
    torch.testing.assert_close(losses(model, weighted)[0][0], want, atol=1e-6, rtol=1e-6)


def test_shapes_and_causality():
    """Depth k has T - k predictions, and none at position t sees a token after t + k."""
    model = load(depth=2).eval()
    ids = sequences(0, 8)[0]
    before = chain(model, ids)
    assert [len(x) for x in before] == [7, 6]
    layout = collate([text(ids)], pad_id=3)
    seen = {}
    for k in (1, 2):
        depth = model.mtp.get_submodule(str(k))
        depth.norm.register_forward_hook(lambda m, a, out, k=k: seen.setdefault(k, []).append(out.detach()))
    losses(model, layout)
    for changed in range(2, 8):
        other = layout.input_ids.clone()
        other[0, changed] = (other[0, changed] + 1) % 90
        losses(model, replace(layout, input_ids=other))
        for k in (1, 2):  # rows of the hook are the predictions of x_{k+1}, …: position t is row t
            first, now = seen[k][0], seen[k][-1]
            assert first.shape[0] == 8 - k - 1
            safe = changed - k  # positions before this one embed nothing from `changed` on
            torch.testing.assert_close(first[:safe], now[:safe])
            assert not torch.allclose(first[safe:], now[safe:]) or safe >= len(first)


def test_weight_zero_leaves_the_gradients_bit_identical():
    layout = collate([text(p) for p in sequences(0, 9, 5)], pad_id=3)
    found = []
    for model in (models.load("lab/llama-50k", seed=0).model, part.build("model", {"multi-token-prediction": {"weight": 0.0}}).obj(
        models.load("lab/llama-50k", seed=0).model)):  # fmt: skip
        with aux.collect(layout) as extra:
            loss = -token_logps(model.train(), layout).mean()
        (loss + sum(extra.values())).backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert all(torch.equal(g, found[1][n]) for n, g in found[0].items())
    assert all(g is not None and not g.any() for n, g in found[1].items() if n.startswith("mtp"))


def test_gradients_reach_everything():
    layout = collate([text(p) for p in sequences(0, 9, 5)], pad_id=3)
    model = load(depth=2)
    with aux.collect(layout) as extra:
        token_logps(model.train(), layout)
    extra["mtp"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_rows_too_short_for_any_prediction():
    layout = collate([text(p) for p in sequences(0, 2, 2)], pad_id=3)
    model = load()
    with aux.collect(layout) as extra:
        token_logps(model.train(), layout)
    assert float(extra["mtp"].detach()) == 0
    extra["mtp"].backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.startswith("mtp"))


def test_training_only_and_only_in_a_run():
    layout = collate([text(p) for p in sequences(0, 9, 5)], pad_id=3)
    model = load()
    with aux.collect(layout) as extra:
        token_logps(model.eval(), layout)
    assert not extra
    plain = models.load("lab/llama-50k").model.double()
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("mtp")}, strict=True)
    ids = layout.input_ids
    assert torch.equal(model.train()(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_checkpointing_changes_no_gradient():
    layout = collate([text(p) for p in sequences(0, 9, 5)], pad_id=3, rows=[[0, 1]])
    found = []
    for checkpointed in (False, True):
        model = load(depth=2).train()
        if checkpointed:
            models.checkpoint_activations(model)
        with aux.collect(layout) as extra:
            loss = -token_logps(model, layout).mean()
        (loss + extra["mtp"]).backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert all(torch.equal(g, found[1][n]) for n, g in found[0].items())


def test_a_copied_model_calls_its_own_blocks():
    layout = collate([text(p) for p in sequences(0, 9, 5)], pad_id=3)
    first = load()
    second = copy.deepcopy(first)
    with torch.no_grad():
        for p in first.mtp.parameters():
            p.zero_()
    with aux.collect(layout) as extra:
        token_logps(second.train(), layout)
    extra["mtp"].backward()
    assert all(p.grad is not None and p.grad.any() for p in second.mtp.parameters())


def test_the_weight_falls_for_the_last_third():
    built = part.build("model", "multi-token-prediction")
    run = tiny(built.obj, model=built.obj(models.load("lab/llama-50k").model), steps=6)
    seen = []
    for _ in range(6):
        run.step()
        seen.append(run.context.model.mtp.weight)
    assert seen == [0.3, 0.3, 0.3, 0.3, 0.1, 0.1]


# --- learning and drafting ----------------------------------------------------------------------------------


def successors(rows, length, seed=0, step=7, vocabulary=50):
    g = np.random.default_rng(seed)
    return [(5 + (int(g.integers(vocabulary)) + step * np.arange(length)) % vocabulary).astype(np.int32) for _ in range(rows)]


@pytest.fixture(scope="module")
def trained():
    """Trained on sequences in which every token determines the next."""
    torch.manual_seed(0)
    model = part.build("model", {"multi-token-prediction": {"depth": 2, "weight": 1.0}}).obj(models.load("lab/llama-50k").model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for step in range(80):
        layout = collate([text(x) for x in successors(16, 12, seed=step)], pad_id=3)
        with aux.collect(layout) as extra:
            loss = -token_logps(model.train(), layout).mean()
        (loss + extra["mtp"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_a_deterministic_sequence_is_predicted_at_every_depth(trained):
    layout = collate([text(x) for x in successors(8, 12, seed=999)], pad_id=3)
    found, _ = losses(trained, layout)
    assert all(float(x.detach()) < 0.1 for x in found), found  # off by one, depth k would predict x_{t+k} or x_{t+k+2} instead


def greedy(model, ids, new):
    for _ in range(new):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("before", ["plain", "mla", "moe"])
@pytest.mark.parametrize("new", [1, 2, 13])
def test_drafting_changes_nothing_of_untrained_models(before, new):
    model = load(before=before, depth=2, seed=3).eval()
    ids = torch.tensor([[5, 9, 7, 22]])
    with torch.no_grad():
        expected = greedy(model, ids, new)
    found = speculate(model, ids, new)
    assert torch.equal(found.ids, expected)
    assert found.accepted <= found.drafted


def test_drafting_saves_passes_of_a_trained_model(trained):
    model = copy.deepcopy(trained)
    ids = torch.from_numpy(successors(1, 5, seed=4)[0]).long().unsqueeze(0)
    found = speculate(model, ids, 30)
    with torch.no_grad():
        assert torch.equal(found.ids, greedy(model, ids, 30))
    assert found.accepted >= 0.8 * found.drafted
    assert found.passes <= 14  # three tokens a pass at best
    stop = int(found.ids[0, 12])
    cut = speculate(model, ids, 30, stop=stop).ids[0].tolist()
    assert cut == found.ids[0, : 5 + found.ids[0, 5:].tolist().index(stop) + 1].tolist()


def test_partly_right_drafts_are_cut_at_the_first_wrong_one(trained):
    """A second depth that is always wrong leaves the first one's drafts and the output."""
    model = copy.deepcopy(trained)
    with torch.no_grad():
        model.mtp.get_submodule("2").norm.weight.neg_()
    ids = torch.from_numpy(successors(1, 5, seed=4)[0]).long().unsqueeze(0)
    found = speculate(model, ids, 20)
    with torch.no_grad():
        assert torch.equal(found.ids, greedy(model, ids, 20))
    assert found.accepted >= 0.8 * found.drafted
    assert 10 <= found.passes <= 13


def test_a_draft_that_only_follows_from_a_wrong_one_does_not_count(trained, monkeypatch):
    ids = torch.from_numpy(successors(1, 5, seed=4)[0]).long().unsqueeze(0)
    with torch.no_grad():
        truth = greedy(trained, ids, 30)

    def drafts(model, known, states):
        wrong = torch.where(truth[:, known.shape[1]] == 5, 6, 5).unsqueeze(0)
        follows = trained(input_ids=torch.cat([known, wrong], dim=1)).logits[:, -1:].argmax(-1)
        return torch.cat([wrong, follows], dim=1)

    monkeypatch.setattr("metier.parts.model._drafting._drafts", drafts)
    found = speculate(copy.deepcopy(trained), ids, 20)
    assert torch.equal(found.ids, truth[:, :25])
    assert found.accepted == 0


# --- runs ---------------------------------------------------------------------------------------------------


def test_a_run_of_all_three_parts_trains_exports_and_loads(tmp_path):
    import metier
    from metier.core.export import export

    transform = ["mla", {"deepseek-moe": {"dense_first": 0}}, "multi-token-prediction"]
    run = {"model": "lab/llama-50k", "data": {"train": "lab/markov", "limit": 40, "max_length": 512, "packed": True},
           "transform": transform, "train": {"steps": 3, "batch": 4}}  # fmt: skip
    done = metier.train(run, out=tmp_path / "run", quiet=True)
    assert all(e["mtp"] > 0 and e["balance"] > 0 for e in done.events if e["event"] == "step")
    export(done.folder, tmp_path / "out")
    model, back = (models.load(str(f)).model.eval() for f in (done.folder / "model", tmp_path / "out"))
    assert all(torch.equal(t, back.state_dict()[n]) for n, t in model.state_dict().items())
    ids = torch.randint(5, 99, (1, 6))
    assert speculate(back, ids, 5).ids.shape == (1, 11)


def test_refusals():
    for name in ("lab/gpt2-1m", "lab/bert-1m"):
        with pytest.raises(UsageError, match="takes no further blocks"):
            part.build("model", "multi-token-prediction").obj(models.load(name).model)
    twice = part.build("model", "multi-token-prediction").obj(models.load("lab/llama-50k").model)
    with pytest.raises(UsageError, match="takes no further blocks"):
        part.build("model", "multi-token-prediction").obj(twice)
