"""The lab: corpora and models that every machine has."""

import pytest
import torch

from metier.core import models
from metier.core.errors import UsageError
from metier.lab import corpus, zoo
from metier.lab.tokenizer import lab_tokenizer


def test_corpora_are_real_and_ordered():
    both, docs, sources = (corpus.documents(f"lab/{n}") for n in ("python", "pydoc", "stdlib"))
    assert both == (*docs, *sources)
    assert sum(len(d["text"]) for d in docs) > 1_000_000
    assert len({d["path"] for d in both}) == len(both)
    with pytest.raises(UsageError, match="lab/python"):
        corpus.documents("lab/pythn")


def test_tokenizer_is_lossless_and_marks_generation():
    tokenizer = lab_tokenizer()
    text = "def f(x):\n    return 'ä → ∑' # tab\t end"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    out = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True)
    answer = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(answer) == "Hello<|im_end|>"


@pytest.mark.parametrize("name", [f"lab/{n}" for n in zoo.SIZES])
def test_models_are_what_their_names_say(name):
    a, b = models.load(name, seed=1), models.load(name, seed=1)
    size = sum(p.numel() for p in a.model.parameters())
    word = name.rsplit("-", 1)[1]
    assert size == pytest.approx(float(word[:-1]) * {"k": 1e3, "m": 1e6}[word[-1]], rel=0.35)
    assert a.fingerprint == b.fingerprint != models.load(name, seed=2).fingerprint
    assert len(models.blocks(a.model)) == a.model.config.num_hidden_layers
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_loading_leaves_the_callers_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    models.load("lab/llama-50k", seed=9)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [("lab/lama-1m", "lab/llama-1m"), ("minilmm", "minilm"), ("./nowhere", "no model folder"), ("/tmp", "config.json")],
)
def test_a_wrong_model_is_refused_before_anything_loads(name, message):
    with pytest.raises(UsageError, match=message):
        models.check(name)


def test_a_hub_model_without_network_is_one_clear_message():
    with pytest.raises(UsageError, match=r"(?s)nobody/nothing.*lab/llama-1m"):
        models.load("nobody/nothing")
