"""The contract suites catch the usual defects: each of these parts is wrong in one way, and is refused for
it."""

import itertools
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metier.core import models, part
from metier.core.batch import Lists, Pairs, Tokens
from metier.core.data.examples import Preference, Prompted, Ranked
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


@bad("objective", "order of the batch", needs=("tokens", "reference"))
def answer_of_another_list(b: Lists):
    sums = torch.zeros_like(b.logps).flatten().index_add(0, b.tokens.sequence, b.tokens.logps - b.tokens.ref_logps)
    return -(sums.view_as(b.logps).roll(1, 0) * b.score).sum(1)


class Counted:
    """An objective with a state, right but for what its children do."""

    reads = Pairs

    def __init__(self):
        self.mean = 0.0

    def __call__(self, b: Pairs):
        return -F.logsigmoid(b.chosen_logps - b.rejected_logps - self.mean)

    def observe(self, b: Pairs):
        self.mean = float((b.chosen_logps - b.rejected_logps).detach().mean())

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


@bad("objective", "outside of observe", needs=("batch",))
class LearnsWhenCalled(Counted):
    calls = 0

    def __call__(self, b: Pairs):
        self.calls += 1
        return super().__call__(b)

    def state_dict(self):
        return {"mean": self.mean, "calls": self.calls}


@bad("objective", "missing in state_dict", needs=("batch",))
class ForgetsItsMean(Counted):
    def state_dict(self):
        return {}

    def load_state_dict(self, state): ...


@bad("objective", "not plain JSON", needs=("batch",))
class KeepsTensors(Counted):
    def state_dict(self):
        return {"mean": torch.tensor(self.mean)}


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


@bad("source", "changed its inputs")
class WritesIntoRows:
    def stream(self, inputs, *, epoch, rng, progress):
        for rows in inputs.values():
            for i in rng.permutation(len(rows)):
                rows[i].meta["seen"] = True
                yield rows[i]


@bad("source", "every seed gives the same")
class DrawsForNothing:
    def stream(self, inputs, *, epoch, rng, progress):
        for rows in inputs.values():
            rng.permutation(len(rows))
            yield from rows


@bad("source", "what was read before")
class GoesOnWhereItStopped:
    def __init__(self):
        self.at = 0

    def stream(self, inputs, *, epoch, rng, progress):
        found = [e for rows in inputs.values() for e in rows]
        for _ in range(5):
            self.at += 1
            yield found[self.at % len(found)]


@bad("source", "no example")
class GivesRows:
    def stream(self, inputs, *, epoch, rng, progress):
        for rows in inputs.values():
            yield from (SimpleNamespace(id=r.id) for r in rows)


@bad("source", "cannot be used")
class EqualAnswers:
    takes = (Preference,)

    def stream(self, inputs, *, epoch, rng, progress):
        for rows in inputs.values():
            yield from (replace(r, rejected=r.chosen) for r in rows)


@bad("source", "says that it takes Ranked")
class SaysTooMuch:
    takes = (Preference, Ranked)

    def stream(self, inputs, *, epoch, rng, progress):
        for rows in inputs.values():
            yield from (r for r in rows if isinstance(r, Preference))


class Answers:
    """A source of rounds, right but for what its children do."""

    takes = (Prompted,)

    def round(self, inputs, *, policy, round, rng):
        asked = [e for rows in inputs.values() for e in rows][:4]
        seed = int(rng.integers(2**31))
        drawn = policy.sample([e.prompt for e in asked], 2, max_new_tokens=8, seed=seed)
        return [self.made(e, *(a.text for a in own)) for e, own in zip(asked, drawn, strict=True)]

    def made(self, e, first, second):
        return Preference(e.prompt, first, second, meta=e.meta)


@bad("source", "which types of examples it reads", needs=("policy",))
class SaysNothing(Answers):
    takes = ()


@bad("source", "depend on more than rng", needs=("policy",))
class OwnSeeds(Answers):
    def round(self, inputs, *, policy, round, rng):
        return super().round(inputs, policy=policy, round=round, rng=np.random.default_rng())


@bad("source", "every seed gives the same", needs=("policy",))
class OneSeed(Answers):
    def round(self, inputs, *, policy, round, rng):
        rng.random()
        return super().round(inputs, policy=policy, round=round, rng=np.random.default_rng(round))


@bad("source", "resumed run makes other rounds", needs=("policy",))
class RemembersRounds(Answers):
    def __init__(self):
        self.kept = []

    def round(self, inputs, *, policy, round, rng):
        self.kept += super().round(inputs, policy=policy, round=round, rng=rng)
        return list(self.kept)


@bad("source", "torch's global generator", needs=("policy",))
class GlobalSeed(Answers):
    def round(self, inputs, *, policy, round, rng):
        torch.manual_seed(int(rng.integers(99)))
        return super().round(inputs, policy=policy, round=round, rng=rng)


@bad("source", "changes the weights", needs=("policy",))
class TrainsMeanwhile(Answers):
    def round(self, inputs, *, policy, round, rng):
        made = super().round(inputs, policy=policy, round=round, rng=rng)
        with torch.no_grad():
            policy.bundle.model.lm_head.weight[-1].add_(1e-6)  # of a word that hardly comes up
        return made


@bad("source", "in another mode", needs=("policy",))
class LeavesItInEvaluation(Answers):
    def round(self, inputs, *, policy, round, rng):
        policy.bundle.model.eval()
        return super().round(inputs, policy=policy, round=round, rng=rng)


@bad("source", "cannot be written down as JSON", needs=("policy",))
class NumpyInRows(Answers):
    def made(self, e, first, second):
        return Preference(e.prompt, first, second, meta={**e.meta, "length": np.int64(len(first))})


@bad("source", "what its row said", needs=("policy",))
class DropsTheRow(Answers):
    def made(self, e, first, second):
        return Preference(e.prompt, first, second)


@bad("source", "makes nothing of it", needs=("policy",))
class OneAnswerOnly(Answers):
    def made(self, e, first, second):
        return Preference(e.prompt, first, first, meta=e.meta)  # the core leaves such pairs out


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
