"""Sampling from a mixture of two models' logits: whole forward passes of both as the oracle.

Bugs it is meant to catch: the shares exchanged, probabilities mixed instead of logits, a cache shared by the two models, an
adapter switched off for both, rows dropped in one of them only.
"""

import numpy as np
import pytest
import torch
from random_models import prompts, sharp

from metier.core import models, part
from metier.core.adapt import attach
from metier.core.errors import UsageError
from metier.core.sample import Mixture, sample


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids, dtype=torch.long)[None]).logits[0].double()


@pytest.mark.parametrize("share", [0.0, 0.125, 0.6, 1.0])
def test_tokens_and_log_probabilities_are_those_of_the_mixed_logits(share):
    one, two = sharp(seed=3), sharp(seed=4)
    asked = prompts(3, 9, 5)
    for temperature in (0.0, 1.0):
        found = sample(
            one.model, one.tokenizer, asked, number=3, max_new_tokens=8, temperature=temperature, mixture=Mixture(two.model, share),
        )  # fmt: skip
        for ids, row in zip(asked, found, strict=True):
            for a in row:
                both = [logits(m.model, [*ids, *a.ids])[len(ids) - 1 : -1] for m in (one, two)]
                z = (1 - share) * both[0] + share * both[1]
                if temperature == 0:
                    assert z.argmax(1).tolist() == a.ids.tolist()
                at = z.log_softmax(1).gather(1, torch.tensor(a.ids, dtype=torch.long)[:, None])[:, 0]
                np.testing.assert_allclose(a.logps, at, atol=2e-4)


def test_shares_0_and_1_are_the_models_themselves():
    one, two = sharp(seed=3), sharp(seed=4)
    asked = prompts(4, 7)

    def texts(model, mixture=None):
        rows = sample(model, one.tokenizer, asked, number=2, max_new_tokens=6, seed=1, mixture=mixture)
        return [[a.ids.tolist() for a in row] for row in rows]

    assert texts(one.model, Mixture(two.model, 0.0)) == texts(one.model)
    assert texts(one.model, Mixture(two.model, 1.0)) == texts(two.model) != texts(one.model)


def test_first_tokens_are_as_frequent_as_the_mixture_says():
    words = models.load("lab/words-120k", seed=1), models.load("lab/words-120k", seed=2)
    with torch.no_grad():
        for b in words:
            for p in b.model.parameters():
                p.mul_(3)
    ids = np.array([5, 60, 90], np.int32)
    drawn = sample(
        words[0].model,
        words[0].tokenizer,
        [ids],
        number=4000,
        max_new_tokens=1,
        end_ids=[0],
        mixture=Mixture(words[1].model, 0.3),
    )[0]
    z = 0.7 * logits(words[0].model, ids)[-1] + 0.3 * logits(words[1].model, ids)[-1]
    p = z.softmax(0).numpy()
    seen = np.bincount([int(a.ids[0]) for a in drawn], minlength=len(p)) / 4000
    assert np.abs(seen - p).max() < 5 * np.sqrt(p.max() / 4000)
    assert np.abs(seen - p).sum() / 2 < 0.15


def test_an_adapter_is_switched_off_for_the_second_model_only():
    plain, adapted = sharp(), sharp()
    torch.manual_seed(0)
    attached = attach(adapted.model, part.build("adapter", {"lora": {"rank": 4}}))
    with torch.no_grad():
        for name, p in attached.model.named_parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    asked = prompts(4, 6)
    how = {"number": 2, "max_new_tokens": 6, "seed": 2}
    found = sample(
        attached.model, plain.tokenizer, asked, **how, mixture=Mixture(attached.model, 0.5, attached.disabled)
    )  # fmt: skip
    expected = sample(attached.model, plain.tokenizer, asked, **how, mixture=Mixture(plain.model, 0.5))
    alone = sample(attached.model, plain.tokenizer, asked, **how)
    ids = [[[a.ids.tolist() for a in row] for row in rows] for rows in (found, expected, alone)]
    assert ids[0] == ids[1] != ids[2]
    assert all(a.enabled for a in attached.adapters.values())


def test_another_vocabulary_is_refused():
    one, other = sharp(), models.load("lab/words-120k", seed=1)
    with pytest.raises(UsageError, match="cannot be mixed"):
        sample(
            one.model, one.tokenizer, [np.array([5, 6], np.int32)], number=1, max_new_tokens=2, mixture=Mixture(other.model, 0.5)
        )
