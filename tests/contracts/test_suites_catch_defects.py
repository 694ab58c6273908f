"""The contract suites catch the usual defects: each of these parts is wrong in one way, and is refused for
it."""

import itertools
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metier.core import models, part
from metier.core.batch import Pairs, Tokens
from metier.testing import decode, hook, law, model, objective, probe, reward, source

SUITES = {s.__name__.rsplit(".")[-1]: s for s in (decode, hook, law, model, objective, probe, reward, source)}
BAD = []


def bad(kind, message, **declared):
    def keep(obj):
        named = part.part(f"{kind}/bad", paper="none", **declared)(obj)
        BAD.append(pytest.param(kind, named, message, id=f"{kind} {obj.__name__}"))
        return obj

    return keep


# --- objectives ------------------------------------------------------------------------------------------


@bad("objective", "one per unit")
def summed(b: Tokens):
    return -b.logps.sum()


@bad("objective", "loss inf|loss .*inf|nan")
def overflows(b: Pairs):
    return torch.log1p(torch.exp(b.rejected_logps - b.chosen_logps))


@bad("objective", "order of the batch")
def neighbours(b: Pairs):
    return -F.logsigmoid(b.chosen_logps - b.rejected_logps.roll(1))


@bad("objective", "no gradient")
def detached(b: Tokens):
    return (-b.logps).detach() + 0 * b.logps


@bad("objective", "not that of the loss")
def halves(b: Tokens):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return -x

        @staticmethod
        def backward(ctx, g):
            return -0.5 * g

    return Wrong.apply(b.logps)


@bad("objective", "float32 loss")
def single(b: Tokens):
    return -b.logps.float()


@bad("objective", "in place")
def in_place(b: Pairs):
    loss = -F.logsigmoid(b.chosen_logps - b.rejected_logps)
    b.chosen_len.mul_(2)
    return loss


# --- hooks -----------------------------------------------------------------------------------------------


@bad("hook", "something is missing in state_dict")
class Forgets:
    def __init__(self):
        self.n = 0

    def on_gradients(self, ctx):
        self.n += 1
        for _, p in ctx.trainable():
            p.grad.mul_(self.n)


@bad("hook", "evaluat")
class ScalesInEvaluation:
    def on_eval_start(self, ctx):
        with torch.no_grad():
            for _, p in ctx.trainable():
                p.mul_(0.5)

    def on_eval_end(self, ctx):
        with torch.no_grad():
            for _, p in ctx.trainable():
                p.mul_(2.0001)


@bad("hook", "the same run gave other weights")
class Unseeded:
    def on_gradients(self, ctx):
        scale = float(np.random.default_rng().random())
        for _, p in ctx.trainable():
            p.grad.mul_(scale)


@bad("hook", "two evaluations in a row differ|evaluating changes")
class NoiseAlways:
    def on_start(self, ctx):
        models.embeddings(ctx.model).register_forward_hook(lambda m, a, out: out + torch.randn_like(out))


@bad("hook", "neither a tensor nor JSON")
class Pickles:
    def on_step(self, ctx): ...

    def state_dict(self):
        return {"rng": np.random.default_rng(0)}

    def load_state_dict(self, state): ...


# --- sources ---------------------------------------------------------------------------------------------


@bad("source", "depends on more than rng")
class OwnRandomness:
    def stream(self, inputs, *, epoch, rng, progress):
        for rows in inputs.values():
            yield from (rows[i] for i in np.random.default_rng().permutation(len(rows)))


@bad("source", "continues differently")
class OrderByProgress:
    def stream(self, inputs, *, epoch, rng, progress):
        for rows in inputs.values():
            for _ in rows:
                if progress() > 0.5:
                    rng.random()
                yield rows[int(rng.integers(len(rows)))]


@bad("source", "not from its inputs")
class Invents:
    def stream(self, inputs, *, epoch, rng, progress):
        for rows in inputs.values():
            yield from (replace(r, id="new") for r in rows)


@bad("source", "changed its inputs|depends on more")
class Consumes:
    def stream(self, inputs, *, epoch, rng, progress):
        for rows in inputs.values():
            yield rows.pop()


# --- models, decoding, rewards, probes, laws -------------------------------------------------------------


@bad("model", "state is missing|Missing|Unexpected|differently")
def hidden_state(m):
    scale = 1 + torch.rand(1).item() + next(HIDDEN)
    models.embeddings(m).register_forward_hook(lambda _, a, out: out + scale)
    return m


HIDDEN = itertools.count()


@bad("model", "see later tokens")
def bidirectional(m):
    class Mean(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + x.mean(1, keepdim=True)

    block = models.blocks(m)[0]
    name = next(n for n in ("mlp", "intermediate") if hasattr(block, n))
    if name == "intermediate":
        raise part.UsageError("no")
    setattr(block, name, Mean(getattr(block, name)))
    return m


@bad("decode", "hooks are left behind")
class Stays:
    @contextmanager
    def attach(self, model, tokenizer):
        models.blocks(model)[0].register_forward_pre_hook(lambda m, args: None)
        yield model


@bad("decode", "weights changed|hooks are left behind")
class EditsWeights:
    @contextmanager
    def attach(self, model, tokenizer):
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        yield model
        with torch.no_grad():
            next(model.parameters()).div_(1.01)


@bad("reward", "shape")
def flat(prompts, completions, answers):
    return torch.zeros(sum(map(len, completions)))


@bad("reward", "other prompts")
def whitened(prompts, completions, answers):
    r = torch.tensor([[float(len(c)) for c in row] for row in completions]).reshape(len(prompts), -1)
    return r - r.mean() if r.numel() else r


@bad("probe", "changes the weights")
def steps(p):
    with torch.no_grad():
        next(p.model.parameters()).add_(1)
    return {}


@bad("probe", "not plain JSON")
def infinite(p):
    return {"value": float("nan")}


@bad("law", "not fitted")
class WrongBounds:
    names, inputs, output = ("c", "p"), ("x",), "y"
    bounds = {"c": (1e-3, 1e3), "p": (0.0, 0.1)}
    typical = {"c": 2.0, "p": -0.5}

    def start(self, x, y):
        return [[1.0, 0.05]]

    def predict(self, theta, x):
        return theta[0] * x["x"] ** theta[1]


@pytest.mark.parametrize(("kind", "obj", "message"), BAD)
def test_defect_is_caught(kind, obj, message, monkeypatch):
    monkeypatch.setattr(part, "load", lambda *_, **__: obj)
    with pytest.raises(AssertionError, match=message):
        SUITES[kind].check(f"{kind}/bad")
