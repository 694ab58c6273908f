"""Oracle of decode/activation-addition: hidden states recorded from outside, before and after.

Bugs it is meant to catch: the wrong layer (off by one), the output instead of the input of the block, added
again at every generated token, positions shifted by padding or by the cache, the sign of the difference.
"""

import pytest
import torch

from metier.core import models, part
from metier.core.errors import UsageError
from metier.testing import check_part
from metier.testing._tiny import cached

IDS = torch.randint(5, 200, (1, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def bundle():
    made = models.load("lab/gpt2-1m", seed=0)
    made.model.eval()
    return made


def built(**options):
    return part.build(
        "decode",
        {"activation-addition": {"positive": "love and peace", "negative": "hate", "layer": 2, **options}},
    ).obj


@torch.no_grad()
def streams(model, ids, **more):
    """Residual stream entering every block (and leaving the last one, normalised)."""
    return model(input_ids=ids, output_hidden_states=True, **more).hidden_states


def entering(bundle, text, layer, length=None):
    tok = bundle.tokenizer
    ids = [tok.eos_token_id, *tok(text)["input_ids"]]
    ids += tok(" ")["input_ids"] * ((length or len(ids)) - len(ids))
    return streams(bundle.model, torch.tensor([ids]))[layer][0]


def test_contract():
    check_part("decode/activation-addition")


def test_front_adds_token_by_token_at_one_layer(bundle):
    before = streams(bundle.model, IDS)
    length = 1 + len(bundle.tokenizer("love and peace")["input_ids"])
    expected = 3 * (entering(bundle, "love and peace", 2) - entering(bundle, "hate", 2, length))
    with built(coefficient=3.0).attach(bundle.model, bundle.tokenizer):
        after = streams(bundle.model, IDS)
    for layer in (0, 1):
        assert torch.equal(before[layer], after[layer])
    change = _input_change(bundle, built(coefficient=3.0))
    torch.testing.assert_close(change[0, :length], expected, rtol=1e-4, atol=1e-5)
    assert not change[0, length:].any()


def _input_change(bundle, steering, ids=IDS, **more):
    """Change of what block 2 computes with, seen by a hook that was there first and one that came last."""
    seen = []
    block = models.blocks(bundle.model)[2]
    with steering.attach(bundle.model, bundle.tokenizer):
        handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        plain = block.register_forward_pre_hook(lambda _, args: seen.append(args[0]), prepend=True)
        with torch.no_grad():
            bundle.model(input_ids=ids, **more)
        handle.remove()
        plain.remove()
    return seen[1] - seen[0]


def test_every_adds_the_last_tokens_difference_everywhere(bundle):
    expected = 2 * (entering(bundle, "love and peace", 2)[-1] - entering(bundle, "hate", 2)[-1])
    change = _input_change(bundle, built(coefficient=2.0, at="every"))
    torch.testing.assert_close(change[0], expected.expand(12, -1), rtol=1e-4, atol=1e-5)


def test_cached_generation_equals_recomputing(bundle):
    for at in ("front", "every"):
        with built(coefficient=8.0, at=at).attach(bundle.model, bundle.tokenizer), torch.no_grad():
            first = cached(bundle.model, IDS[:, :2])
            second = cached(bundle.model, IDS[:, 2:], first.past_key_values)
            whole = bundle.model(input_ids=IDS)
        torch.testing.assert_close(second.logits, whole.logits[:, 2:], rtol=1e-4, atol=1e-4)


def test_left_padding_does_not_shift_the_front(bundle):
    pad = torch.full((1, 3), bundle.tokenizer.pad_token_id)
    mask = torch.cat([torch.zeros_like(pad), torch.ones_like(IDS)], 1)
    change = _input_change(bundle, built(), ids=torch.cat([pad, IDS], 1), attention_mask=mask)
    assert not change[0, :3].any()
    torch.testing.assert_close(change[0, 3:], _input_change(bundle, built())[0], rtol=1e-4, atol=1e-5)


def test_coefficient_zero_changes_nothing(bundle):
    assert not _input_change(bundle, built(coefficient=0.0)).any()


def test_no_such_layer(bundle):
    with pytest.raises(UsageError, match="0 to 3"), built(layer=4).attach(bundle.model, bundle.tokenizer):
        pass
