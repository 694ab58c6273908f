"""Oracle of hook/max-logit: logits and entropies from each layer's own queries and keys in float64 numpy.

Bugs it is meant to catch: hidden positions or padding counted, the scale forgotten, logits after a cap, entropy of the
logits or per row instead of per token, other micro-batches mixed in, every step computed, hooks left behind.
"""

import numpy as np
import pytest
import torch

from metier.core import models, part
from metier.core.attention import ATTRIBUTE, observed
from metier.core.sublayers import attentions
from metier.parts.hook.max_logit import MaxLogit
from metier.testing import check_part
from metier.testing._tiny import layouts, same, tiny, weights


def test_contract():
    check_part("hook/max-logit")


def expected(model, layout, cap=None):
    """Per layer: largest logit and mean entropy over real tokens, and the number of (token, head) pairs."""
    kept, found = [], []
    with observed(model, kept.append, "x"), torch.no_grad():
        models.backbone(model)(input_ids=layout.input_ids)
    real = layout.group.numpy() > 0
    for seen in kept:
        q, k = (t.double().numpy() for t in (seen.query, seen.key))
        k = np.repeat(k, q.shape[1] // k.shape[1], 1)
        tops, entropies = [], []
        for b, h in np.ndindex(*q.shape[:2]):
            for t in range(q.shape[2]):
                if real[b, t]:
                    z = k[b, h, : t + 1] @ q[b, h, t] / q.shape[-1] ** 0.5
                    tops.append(np.abs(z).max())
                    z = z if cap is None else cap * np.tanh(z / cap)
                    p = np.exp(z - z.max())
                    p /= p.sum()
                    entropies.append(-(p * np.log(p)).sum())
        found.append((max(tops), np.mean(entropies), len(tops)))
    return found


def sharp(cap=None):
    model = models.load("lab/llama-50k", seed=0).model
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "q_proj" in n or "k_proj" in n:
                p.mul_(20)
        # Padding is alone in its direction, which weighs most: its logits would be the largest.
        table, gain = model.get_input_embeddings().weight, models.blocks(model)[0].input_layernorm.weight
        table[:, 0] = 0
        table[0] = torch.eye(16)[0]
        gain[0] = 30
    return model if cap is None else part.build("model", {"soft-cap": {"cap": cap}}).obj(model)


@pytest.mark.parametrize("cap", [None, 0.5])
def test_metrics_against_numpy(cap):
    run = tiny(MaxLogit(every=1, layers=True), model=sharp(cap))
    run.dispatch("on_start", run.context)
    want = expected(run.context.model, layouts(2, seed=0)[0], cap)
    run.step()
    metrics = run.context.metrics
    assert metrics["max_logit"] == pytest.approx(max(w[0] for w in want), rel=1e-5)
    assert metrics["attention_entropy"] == pytest.approx(np.average([w[1] for w in want], weights=[w[2] for w in want]), rel=1e-4)
    rows = run.events[-1]["layers"]
    for row, (top, entropy, _) in zip(rows, want, strict=True):
        assert row["max_logit"] == pytest.approx(top, rel=1e-5)
        assert row["entropy"] == pytest.approx(entropy, rel=1e-4)
    assert cap is None or metrics["max_logit"] > cap


def test_only_every_so_often():
    run = tiny(MaxLogit(every=3), steps=8)
    run.dispatch("on_start", run.context)
    having = []
    for _ in range(8):
        run.step()
        having.append("max_logit" in run.context.metrics)
        run.evaluate()
    assert having == [False, False, True, False, False, True, False, False]


@pytest.mark.parametrize("recompute", [False, True])
def test_the_run_is_the_same_to_the_bit_and_the_model_as_before(recompute):
    def trained(*hooks):
        run = tiny(*hooks, steps=4)
        if recompute:
            models.checkpoint_activations(run.context.model)
        run.dispatch("on_start", run.context)
        for _ in range(4):
            run.step()
        run.dispatch("on_end", run.context)
        assert not any(hasattr(m, ATTRIBUTE) for m in attentions(run.context.model, "x"))
        return weights(run.context.model), run.context.metrics.get("max_logit")

    (plain, _), (watched, value) = trained(), trained(MaxLogit(every=1))
    assert same(plain, watched)
    assert value > 0
