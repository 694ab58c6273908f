"""Oracle of probe/calibration: a second implementation in numpy on the logits of a real model, and cases by
hand.

Bugs it is meant to catch: empty bins counted, bins open on the wrong side, accuracy of the target instead of
the prediction, the gap with the wrong sign, confidence of the target instead of the maximum.
"""

import numpy as np
import pytest
import torch

from metier.core import models, part
from metier.core.batch import Labels, Tokens
from metier.core.probing import Probe
from metier.parts.probe.calibration import table
from metier.testing import check_part
from metier.testing._tiny import layout
from metier.testing.probe import tiny_probe


def test_contract():
    check_part("probe/calibration")


def reference(logits, truth, bins):
    z = logits - logits.max(1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    confidence, right = p.max(1), p.argmax(1) == truth
    error = 0.0
    for low in np.linspace(0, 1, bins + 1)[:-1]:
        inside = (confidence > low) & (confidence <= low + 1 / bins)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error, right.mean(), confidence.mean(), -np.log(p[np.arange(len(p)), truth]).mean()


def test_tokens_against_numpy():
    probe = tiny_probe()
    with torch.no_grad():
        for p in probe.model.parameters():
            p.mul_(4)
        models.embeddings(probe.model).weight.mul_(40)  # confident predictions, so that several bins are used
    found = part.build("probe", {"calibration": {"bins": 10}}).obj(probe)
    scored = [probe.score(x, reads=Tokens, needs=("logits",)) for x in probe.layouts]
    logits = torch.cat([s.logits for s in scored]).double().numpy()
    truth = torch.cat([s.targets for s in scored]).numpy()
    assert [found[k] for k in ("ece", "accuracy", "confidence", "nll")] == pytest.approx(reference(logits, truth, 10), rel=1e-9)
    assert found["gap"] == pytest.approx(found["confidence"] - found["accuracy"])
    assert found["unit"] == "token"
    assert found["count"] == sum(len(x.target) for x in probe.layouts)
    assert len(found["bins"]) > 1


def test_classifier_units_are_examples():
    tiny = tiny_probe()
    bundle = models.load("lab/llama-50k", task="classify", num_labels=3)
    rows = [layout([[1, 2, 3], [4, 5, 6, 7]], label=[0, 2]), layout([[3, 2]], label=[1])]
    found = part.build("probe", "calibration").obj(Probe(bundle, tiny.module, Labels, rows, tiny.engine))
    assert found["count"] == 3
    assert found["unit"] == "example"


def test_bins_by_hand():
    confidence = torch.tensor([0.5, 0.51, 1.0, 0.2], dtype=torch.float64)
    correct = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    rows = table(confidence, correct, 2, "width")
    assert [r["count"] for r in rows] == [2, 2]  # 0.5 belongs to (0, 0.5]
    assert [r["accuracy"] for r in rows] == [0.5, 0.5]
    assert rows[0]["confidence"] == pytest.approx(0.35)
    assert [r["count"] for r in table(confidence, correct, 3, "mass")] == [2, 1, 1]
    assert [r["count"] for r in table(confidence, correct, 100, "width")] == [1, 1, 1, 1]
