"""Oracle of core/kernel and of flex attention's masks: the dense masks and SDPA's scores, element by element.

Bugs it is meant to catch: a block mask that lets a branch see its sibling or forgets the window, flex taken where it cannot be
used, a failure that stops the run instead of falling back, gradients left behind by the trial.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from metier import train
from metier.core import kernel, models
from metier.core.data.collate import collate
from metier.core.data.encode import Item
from metier.core.errors import UsageError
from metier.core.forward import block_mask, masking
from metier.core.layout import Layout
from metier.core.scores import token_logps

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
         "vocab_size": 97, "pad_token_id": 3, "bos_token_id": None, "eos_token_id": 0}  # fmt: skip
KINDS = {
    "llama": ("LlamaConfig", SMALL),
    "mistral": ("MistralConfig", {**SMALL, "sliding_window": 3}),
    "gemma3": ("Gemma3TextConfig", {**SMALL, "sliding_window": 3, "head_dim": 8,
                                    "layer_types": ["sliding_attention", "full_attention"]}),
}  # fmt: skip


def tiny(name, **more):
    import transformers

    torch.manual_seed(1)
    kind, options = KINDS[name]
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**options, **more})).eval()


def ids(n, seed):
    return np.random.default_rng(seed).integers(5, 95, n).astype(np.int32)


def answered(prompt, *answers):
    own = tuple(ids(n, 10 * prompt + k) for k, n in enumerate(answers, 1))
    return Item(ids(prompt, prompt), np.zeros(prompt, bool), own, tuple(np.ones(n, bool) for n in answers), "x")


def rows():
    """Groups of one to four answers in two rows, with padding."""
    return collate(
        [answered(6, 5, 7), answered(2, 1, 3, 2), answered(9, 4), answered(3, 1, 1, 2, 5)], pad_id=3, rows=[[1, 0], [2, 3]]
    )


def long_rows():
    """Rows of more than one of flex attention's blocks, of random groups."""
    rng = np.random.default_rng(0)
    made = [answered(int(rng.integers(1, 40)), *rng.integers(1, 40, rng.integers(1, 4)).tolist()) for _ in range(14)]
    return collate(made, pad_id=3, rows=[list(range(5)), list(range(5, 14))])


# --- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [rows, long_rows])
@pytest.mark.parametrize("window", [None, 1, 3, 20])
def test_the_mask_function_is_the_dense_mask(layout, window):
    from torch.nn.attention.flex_attention import create_mask

    rows = layout()
    expected = rows.visible()
    if window is not None:
        p = rows.position_ids
        expected = expected & (p[:, :, None] - p[:, None, :] < window)
    height, width = rows.group.shape
    made = create_mask(rows.rule(window), height, 1, width, width, device="cpu")[:, 0]
    assert torch.equal(made, expected)
    assert not expected.all()
    blocks = block_mask(rows, window)
    assert blocks.shape == (height, 1, width, width)
    any_seen = torch.nn.functional.max_pool2d(expected[:, None].float(), 128, ceil_mode=True).bool()
    assert torch.equal(blocks.to_dense().bool() & any_seen, any_seen)


def test_every_kind_of_layer_gets_its_mask():
    model = tiny("gemma3")
    dense = masking(model, rows())["attention_mask"]
    model.set_attn_implementation("flex_attention")
    blocks = masking(model, rows())["attention_mask"]
    assert dense.keys() == blocks.keys() == {"full_attention", "sliding_attention"}
    index = torch.arange(rows().group.shape[1])
    for kind, mask in blocks.items():
        found = mask.mask_mod(torch.arange(2)[:, None, None], torch.zeros(()), index[:, None], index)
        assert torch.equal(found, dense[kind][:, 0])


@pytest.mark.parametrize("name", KINDS)
def test_flex_scores_are_those_of_sdpa(name, monkeypatch):
    """Without compilation, which takes a minute on a CPU; the kernel is torch's own reference then."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    module = pytest.importorskip("transformers.integrations.flex_attention")
    monkeypatch.setattr(module, "compile_friendly_flex_attention", lambda q, k, v, training=False, **more: flex(q, k, v, **more))
    model = tiny(name)
    for layout in (rows(), collate([answered(5, 4, 2), answered(3, 1, 6)], pad_id=3)):
        with torch.no_grad():
            expected = token_logps(model, layout)
            model.set_attn_implementation("flex_attention")
            found = token_logps(model, layout)
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        leaky = replace(layout, branch=torch.zeros_like(layout.branch))
        assert not torch.allclose(token_logps(model, leaky), expected, atol=1e-4)


# --- the choice ------------------------------------------------------------------------------------------------------


def said(model, wanted="auto", **more):
    found: list[str] = []
    kernel.choose(model, wanted, **{"grouped": True, "notice": found.append, **more})
    return model.config._attn_implementation, found


@pytest.fixture
def pretended(monkeypatch):
    """A machine that looks as if the model were on a GPU."""
    monkeypatch.setattr(kernel, "on_cuda", lambda model: True)


def test_auto_is_sdpa_by_segments_on_a_cpu():
    assert said(tiny("llama")) == ("segments", [])
    assert said(tiny("llama"), grouped=False) == ("sdpa", [])
    assert said(tiny("llama"), watched=True) == ("segments", [])
    eager = tiny("llama")
    eager.set_attn_implementation("eager")
    assert said(eager) == ("eager", [])


@pytest.mark.parametrize("more", [{"grouped": False}, {"watched": True}], ids=str)
def test_auto_leaves_runs_that_do_not_gain_or_are_watched(more, pretended):
    assert said(tiny("llama"), **more) == ("sdpa", [])


def test_auto_falls_back_when_flex_fails(pretended):
    """Here it fails for real: it has no backward pass on a CPU."""
    model = tiny("llama")
    found, notices = said(model)
    assert found == "sdpa"
    assert len(notices) == 1
    assert notices[0].startswith("attention sdpa instead of flex: ")
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("model", ["dropout", "gpt2"])
def test_auto_falls_back_when_flex_cannot_be_set(model, pretended):
    made = tiny("llama", attention_dropout=0.1) if model == "dropout" else models.load("lab/gpt2-1m").model
    found, notices = said(made)
    assert found == "sdpa"
    assert len(notices) == 1


def test_auto_takes_flex_when_it_computes_the_same(pretended, monkeypatch):
    right = kernel._outcome
    monkeypatch.setattr(kernel, "_outcome", lambda model, layout: sdpa(right, model, layout))
    assert said(tiny("llama")) == ("flex_attention", [])
    monkeypatch.setattr(kernel, "_outcome", lambda model, layout: wrong(right, model, layout))
    found, notices = said(tiny("llama"))
    assert found == "sdpa"
    assert "differs from sdpa by" in notices[0]


def sdpa(right, model, layout):
    """What flex attention would compute, had it a backward pass here."""
    kind = model.config._attn_implementation
    model.config._attn_implementation = "sdpa"
    found = right(model, layout)
    model.config._attn_implementation = kind
    return found


def wrong(right, model, layout):
    """The same with a mask that lets everything of a group be seen, under flex attention only."""
    leaky = replace(layout, branch=torch.zeros_like(layout.branch))
    return sdpa(right, model, leaky if model.config._attn_implementation == "flex_attention" else layout)


def test_the_trial_shows_all_that_matters():
    layout: Layout = kernel._sample(tiny("llama"))
    assert layout.group.shape[1] > 128
    assert int(layout.group.max()) > 10
    assert (layout.group == 0).any()
    assert int(layout.branch.max()) == 3


def test_named_kinds():
    assert said(tiny("llama"), "eager") == ("eager", [])
    assert said(tiny("llama"), "sdpa") == ("sdpa", [])
    assert said(tiny("llama"), "segments") == ("segments", [])
    found, notices = said(tiny("llama"), "flex")
    assert found == "sdpa"
    assert "no backward pass" in notices[0]


def test_a_kind_that_cannot_be_set_is_an_error(pretended):
    with pytest.raises(UsageError, match="cannot use flex attention"):
        said(tiny("llama", attention_dropout=0.1), "flex")


def test_the_reference_follows():
    policy, reference = tiny("llama"), tiny("llama")
    policy.set_attn_implementation("eager")
    kernel.follow(reference, policy)
    assert reference.config._attn_implementation == "eager"
    policy.set_attn_implementation("flex_attention")
    stubborn = models.load("lab/gpt2-1m").model
    kernel.follow(stubborn, policy)
    assert stubborn.config._attn_implementation == "sdpa"


def test_a_run_says_what_it_uses(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": " b c", "rejected": " d"}\n' * 4)

    def losses(attention):
        run = {
            "model": "lab/llama-50k", "objective": "dpo", "data": {"train": str(tmp_path / "pairs.jsonl")},
            "train": {"steps": 2, "batch": 2, "device": "cpu", "attention": attention}, "out": str(tmp_path / attention),
        }  # fmt: skip
        events = train(run, quiet=True).events
        return [e["loss"] for e in events if e["event"] == "step"], [e["text"] for e in events if e["event"] == "notice"]

    (a, _), (b, _), (c, notices), (d, _) = map(losses, ("auto", "eager", "flex", "sdpa"))
    assert c == d
    np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(a, d, rtol=1e-5)
    assert sum("flex" in n for n in notices) == 1
