"""Oracle of core/separate: rows written by hand, and scores, gradients and whole runs that do not depend on how answers lie.

Bugs it is meant to catch: an answer that loses its prompt or gets another's, targets or ends in the wrong row, answers in
another order, a model that mixes sequences and is trusted, a token budget that counts the prompt once.
"""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from metier import train
from metier.core import models
from metier.core.batch import Lists, Pairs, Rated, Tokens
from metier.core.data.collate import collate
from metier.core.data.encode import Encoder, Item
from metier.core.data.formats import convert
from metier.core.data.loader import Loader, Shape
from metier.core.errors import UsageError
from metier.core.forward import takes_groups
from metier.core.scores import reference_scorer, score, token_logps
from metier.core.separate import sample_layout, scorer, separate, why_apart

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
         "vocab_size": 97, "pad_token_id": 3, "bos_token_id": None, "eos_token_id": 0}  # fmt: skip
WINDOW = {**SMALL, "sliding_window": 4}


def tiny(kind, **options):
    import transformers

    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options)).eval()


MADE = {
    "llama": ("LlamaConfig", SMALL),
    "qwen2": ("Qwen2Config", SMALL),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 97, "n_positions": 64, "eos_token_id": 0}),
    "gemma": ("GemmaConfig", {**SMALL, "head_dim": 8}),
    "mistral": ("MistralConfig", WINDOW),
    "gemma2": ("Gemma2Config", {**WINDOW, "head_dim": 8}),
}
LAB = ["lab/llama-50k", "lab/qwen2-1m", "lab/gpt2-1m", "lab/gemma-1m"]


def load(name):
    model = tiny(MADE[name][0], **MADE[name][1]) if name in MADE else models.load(name, seed=1).model
    return model.double().eval()


class Exactly(TorchFunctionMode):
    """Norms, rotations and softmax of most families compute in float32; here they stay in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def kept(x):
            return torch.float64 if x is torch.float32 else x

        if func is torch.Tensor.float:
            return args[0].double()
        return func(*map(kept, args), **{k: kept(v) for k, v in (kwargs or {}).items()})


def ids(n, seed):
    return np.random.default_rng(seed).integers(5, 95, n).astype(np.int32)


def answered(prompt, *answers, label=None, id="x", seed=0):
    own = tuple(ids(n, seed + 10 * prompt + k) for k, n in enumerate(answers, 1))
    loss = tuple(np.ones(n, bool) for n in answers)
    return Item(ids(prompt, seed + 1000 + prompt), np.zeros(prompt, bool), own, loss, id, label)


PAIRS = [answered(6, 5, 7), answered(2, 1, 3), answered(9, 4, 4)]
RATED = [answered(5, 4, label=True), answered(1, 6, label=False), answered(7, 2, label=True)]
LISTS = [answered(4, 3, 5, 2, 1, label=(4.0, 3.0, 2.0, 1.0)), answered(7, 2, 2, 6, 3, label=(1.0, 2.0, 3.0, 4.0))]
KINDS = {"pairs": (PAIRS, Pairs), "unpaired": (RATED, Rated), "lists of 4": (LISTS, Lists)}


def alone(items):
    """Every answer a text of its own, made without the code under test."""
    made = []
    for i in items:
        for a, m in zip(i.answers, i.answer_loss, strict=True):
            made.append(Item(np.concatenate([i.prompt, a]), np.concatenate([i.prompt_loss, m]), id="x"))
    return collate(made, pad_id=3)


# --- the layout ------------------------------------------------------------------------------------------------


def listed(layout, *names):
    return [getattr(layout, n).tolist() for n in names]


def test_rows_by_hand():
    """Two groups in a row: prompt 11 12 with 13 and 14 15, prompt 21 with 22 23; and a group of one answer in another."""

    def group(prompt, *answers, **more):
        loss = tuple(np.ones(len(a), bool) for a in answers)
        return Item(np.int32(prompt), np.zeros(len(prompt), bool), tuple(map(np.int32, answers)), loss, **more)

    kinds = {"kind": np.array([1, 2, 3, 4, 5])}
    items = [group([31], [32], id="c"), group([11, 12], [13], [14, 15], id="a", extra=kinds), group([21], [22, 23], id="b")]
    before = collate(items, pad_id=7, rows=[[1, 2], [0]])
    layout = separate(before, 7)
    assert listed(layout, "input_ids", "position_ids", "group") == [
        [[31, 32, 7, 7], [11, 12, 13, 7], [11, 12, 14, 15], [21, 22, 23, 7]],
        [[0, 1, 0, 0], [0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 2, 0]],
        [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]],
    ]
    assert listed(layout, "row", "col", "target", "sequence") == [
        [0, 1, 2, 2, 3, 3], [0, 1, 1, 2, 0, 1], [32, 13, 14, 15, 22, 23], [0, 1, 2, 2, 3, 3],
    ]  # fmt: skip
    assert layout.end.tolist() == [[0, 1], [1, 2], [2, 3], [3, 2]]
    assert layout.extra["kind"].tolist() == [[0] * 4, [1, 2, 3, 0], [1, 2, 4, 5], [0] * 4]
    assert (layout.ids, layout.answers) == (("c", "a", "b"), (1, 2, 1))
    assert layout.plain
    assert not layout.branch.any()
    assert before.real_tokens == layout.real_tokens == 10
    assert replace(layout, filler=True).real_tokens == 0


def test_targets_in_the_prompt_belong_to_the_first_answer():
    item = Item(ids(4, 0), np.array([0, 1, 0, 1], bool), (ids(2, 1), ids(3, 2)), (np.ones(2, bool), np.ones(3, bool)), "x")
    before = collate([item], pad_id=3)
    layout = separate(before, 3)
    assert layout.row.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert layout.target.tolist() == before.target.tolist()
    assert [int(layout.input_ids[r, c + 1]) for r, c in zip(layout.row, layout.col, strict=True)] == layout.target.tolist()


def test_packed_texts_are_separated_and_plain_rows_stay():
    texts = [Item(ids(n, n), np.ones(n, bool), id="x") for n in (5, 3, 4)]
    plain = collate(texts, pad_id=3)
    assert separate(plain, 3) is plain
    again = separate(collate(texts, pad_id=3, rows=[[2, 0], [1]]), 3)
    for name in ("input_ids", "position_ids", "group", "branch", "row", "col", "target", "sequence", "end"):
        assert torch.equal(getattr(again, name), getattr(plain, name)), name


def test_values_of_targets_and_labels_stay():
    extra = {n: np.arange(8, dtype=np.float32) + k for k, n in enumerate(("weight", "reference", "old_logps"))}
    before = collate([replace(answered(2, 3, 3, label=0.5), extra=extra), answered(3, 1, 1, label=1.5)], pad_id=3)
    layout = separate(before, 3)
    for name in ("weight", "reference", "old_logps", "label", "target", "sequence"):
        assert torch.equal(getattr(layout, name), getattr(before, name)), name


# --- scores and gradients -----------------------------------------------------------------------------------------


def graded(model, layout, kind):
    """Every value of the batch, and the gradient of all parameters for unequal weights of answers and tokens."""
    model.zero_grad(set_to_none=True)
    batch, tokens = score(model, layout, kind), score(model, layout, Tokens)
    values = [v for v in vars(batch).values() if isinstance(v, torch.Tensor)]
    loss = sum((v * torch.linspace(-1, 2, v.numel(), dtype=v.dtype).view_as(v)).sum() for v in values if v.requires_grad)
    (loss + (tokens.logps * torch.linspace(1, 3, len(tokens.logps), dtype=torch.float64)).sum()).backward()
    return [v.detach() for v in values], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other):
    for a, b in zip(one[0], other[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert one[1].keys() == other[1].keys() != set()
    for name, g in one[1].items():
        assert (g - other[1][name]).abs().max() <= 1e-10 * max(1.0, float(g.abs().max())), name


@pytest.mark.parametrize(("name", "kind"), [*((n, k) for n in MADE for k in KINDS), *((n, "pairs") for n in LAB)])
def test_once_packed_and_separate_are_the_same(name, kind):
    items, reads = KINDS[kind]
    model = load(name)
    once = collate(items, pad_id=3)
    packed = collate(items, pad_id=3, rows=[[1, 0], [2]] if len(items) > 2 else [[1, 0]])
    with Exactly():
        expected = graded(model, replace(alone(items), answers=once.answers, label=once.label), reads)
        for layout in (once, packed, separate(once, 3), separate(packed, 3)):
            assert_same(graded(model, layout, reads), expected)


# --- which models need it -------------------------------------------------------------------------------------------

MIXING = {
    "mamba": ("MambaConfig", {"vocab_size": 97, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}, "linear_attention"),
    "bloom": ("BloomConfig", {"vocab_size": 97, "hidden_size": 16, "n_layer": 2, "n_head": 2}, "takes no positions"),
    "gpt-neo": ("GPTNeoConfig", {"vocab_size": 97, "hidden_size": 16, "num_layers": 2, "num_heads": 2,
                                 "attention_types": [[["global", "local"], 1]], "window_size": 256}, "window_size"),
    "falcon": ("FalconConfig", {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                                "alibi": True}, "fails on a mask"),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_models_that_need_separate_rows_say_why(name):
    kind, options, reason = MIXING[name]
    assert reason in why_apart(tiny(kind, **options))


@pytest.mark.parametrize("name", [*MADE, *LAB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_that_take_groups(name, dtype):
    model = load(name).to(dtype).train()
    state = torch.get_rng_state()
    assert why_apart(model) is None
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("lost", "dtype"),
    [("attention_mask", torch.float32), ("attention_mask", torch.bfloat16), ("position_ids", torch.float32)],
    ids=str,
)
def test_a_model_that_drops_what_it_is_given_is_found_out(lost, dtype, monkeypatch):
    model = load("lab/llama-50k").to(dtype)
    inner = model.model.forward

    def forward(input_ids=None, attention_mask=None, position_ids=None, **more):
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        return inner(input_ids, **{**given, lost: None}, **more)

    monkeypatch.setattr(model.model, "forward", forward)
    assert takes_groups(model) is None
    assert "influence each other" in why_apart(model)


def test_a_reference_of_another_family_gets_rows_of_its_own():
    mamba = tiny("MambaConfig", **MIXING["mamba"][1])
    plain = reference_scorer(mamba, torch.no_grad)
    rows = collate(PAIRS, pad_id=3)
    with pytest.raises(UsageError, match="several sequences in a row"):
        plain(rows, False)
    torch.testing.assert_close(scorer(mamba, plain, 3)(rows, False), token_logps(mamba, alone(PAIRS)).detach())
    llama = reference_scorer(load("lab/llama-50k"), torch.no_grad)
    assert scorer(load("lab/llama-50k"), llama, 3) is llama


def test_the_sample_is_what_it_is_meant_to_be():
    layout = sample_layout(torch.nn.Embedding(97, 4))
    assert layout.answers == (3, 2)
    assert int(layout.group.max()) == 2
    assert not layout.plain


# --- batches and runs -----------------------------------------------------------------------------------------------


def items(number=40):
    rng = np.random.default_rng(3)
    return [
        answered(int(rng.integers(4, 30)), *rng.integers(2, 25, rng.integers(1, 5)).tolist(), id=f"{i}", seed=i)
        for i in range(number)
    ]


def test_micro_batches_count_the_copies():
    shape = Shape(3, 256, separate=True)
    made = items()
    for layout in shape.layouts(made, shape.micros(made)):
        assert layout.plain
        assert layout.input_ids.numel() <= 256 or len(layout.ids) == 1
    assert sorted(i for micro in shape.micros(made) for row in micro for i in row) == list(range(40))
    assert any(len(layout.ids) > 1 for layout in shape.layouts(made, shape.micros(made)))


def test_a_step_has_the_same_examples_units_and_credit():
    def steps(**more):
        shape = Shape(3, 300, unit="example", **more)
        return list(islice(Loader(items(), None, shape, fingerprint={}, seed=0, batch=8), 4))

    for a, b in zip(steps(), steps(separate=True), strict=True):
        assert (sorted(a.ids), a.units) == (sorted(b.ids), b.units)
        assert sum(x.real_tokens for x in a.micro) == sum(x.real_tokens for x in b.micro)


PREFERENCES = [
    {"prompt": f"{i} and {i + 1} make", "chosen": f" {2 * i + 1}, of course", "rejected": f" about {i}"} for i in range(12)
]


def rows(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in PREFERENCES))
    return str(tmp_path / "pairs.jsonl")


def run(tmp_path, name, model="lab/llama-50k", data=None, **more):
    settings = {
        "model": model, "objective": "dpo", "optimizer": {"adamw": {"lr": 1e-3}}, "schedule": "constant",
        "data": {"train": rows(tmp_path), **(data or {})}, "train": {"steps": 3, "batch": 4, "device": "cpu"},
        "out": str(tmp_path / name),
    }  # fmt: skip
    return train({**settings, **more}, quiet=True)


def notices(result):
    return [e["text"] for e in result.events if e["event"] == "notice"]


def losses(result):
    return [e["loss"] for e in result.events if e["event"] == "step"]


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_the_option_changes_nothing_but_the_rows(tmp_path, objective):
    once = run(tmp_path, "once", objective=objective)
    apart = run(tmp_path, "apart", objective=objective, data={"prompt_once": False})
    np.testing.assert_allclose(losses(once), losses(apart), rtol=2e-5)
    assert [e["tokens"] for e in once.events if e["event"] == "step"] == [
        e["tokens"] for e in apart.events if e["event"] == "step"
    ]
    assert not [n for n in notices(apart) if "copy" in n]


@pytest.fixture(scope="module")
def mamba(tmp_path_factory):
    """A small Mamba with the lab's tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("mamba")
    tokenizer = models.tokenizer_of("lab/llama-50k")
    options = {"vocab_size": len(tokenizer), "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    tiny("MambaConfig", **options, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def by_hand(folder, steps):
    """DPO on a Mamba without metier's loader, layouts, scores and loop: one sequence at a time."""
    model, reference = models.load(folder).model, models.load(folder).model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    found = []
    for chosen in steps:
        loss = 0.0
        for prompt, good, bad in chosen:
            gap = [_logp(m, prompt, good) - _logp(m, prompt, bad) for m in (model, reference)]
            loss = loss - torch.nn.functional.logsigmoid(0.1 * (gap[0] - gap[1].detach())) / len(chosen)
        found.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return found


def _logp(model, prompt, answer):
    whole = torch.tensor([[*prompt.tolist(), *answer.tolist()]])
    logp = torch.log_softmax(model(whole, use_cache=False).logits[0].double(), -1)
    at = range(len(prompt) - 1, whole.shape[1] - 1)
    return sum(logp[t, whole[0, t + 1]] for t in at)


def test_a_mamba_is_trained_on_pairs(tmp_path, mamba):
    options = {"optimizer": {"adamw": {"lr": 1e-3, "weight_decay": 0.0}}, "data": {"shuffle": False}}
    result = run(tmp_path, "mamba", mamba, **options)
    said = [n for n in notices(result) if "its own copy of the prompt" in n]
    assert len(said) == 1
    assert said[0].startswith("mamba: its linear_attention layers")
    encoded = encode(mamba)
    expected = by_hand(mamba, [encoded[0:4], encoded[4:8], encoded[8:12]])
    np.testing.assert_allclose(losses(result), expected, rtol=1e-4)
    assert expected[2] != pytest.approx(expected[0], rel=1e-3)


def encode(mamba):
    """Ids of prompts and answers, in the order of the file."""
    encoder = Encoder(models.tokenizer_of(mamba), max_length=1024, truncate="error", on_empty="error")
    made = [encoder(convert(r, "preference", id=str(i))) for i, r in enumerate(PREFERENCES)]
    return [(i.prompt, *i.answers) for i in made]


def test_packed_rows_are_refused_where_they_cannot_be(tmp_path, mamba):
    with pytest.raises(UsageError, match="mamba cannot take several sequences in a row"):
        run(tmp_path, "a", mamba, data={"packed": True})
    with pytest.raises(UsageError, match=r"data\.prompt_once"):
        run(tmp_path, "b", data={"packed": True, "prompt_once": False})


def test_a_mamba_as_reference_of_a_llama(tmp_path, mamba):
    result = run(tmp_path, "mixed", reference=mamba)
    assert len(losses(result)) == 3
    assert not [n for n in notices(result) if "copy" in n]
