"""Attention modules of Llama, Qwen2, Gemma and GPT-2 transcribed in float64 numpy, and models run over packed rows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metier.core import models, part
from metier.core.data.collate import collate
from metier.core.data.encode import Item
from metier.core.forward import hidden_states

FAMILIES = ("lab/llama-50k", "lab/qwen2-1m", "lab/gemma-1m", "lab/gpt2-1m")


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(x, gain=1.0, bias=0.0, eps=1e-6):
    x = x - x.mean(-1, keepdims=True)
    return gain * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) + bias


def array(t):
    return t.detach().double().numpy()


def rotated(x, positions, theta):
    """Rotary positions, halves paired: ``x`` [B, T, H, d], ``positions`` [B, T]."""
    half = x.shape[-1] // 2
    angle = positions[..., None, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def identity(x):
    return x


def expected(state, config, x, layout, *, q=identity, k=identity, v=identity, logits=identity, probabilities=identity):
    """Output ``[B, T, D]`` of an attention module without bias in its output projection, from plain weights.

    ``q``, ``k``, ``v`` map ``[B, T, H, d]`` before rotary positions; ``logits`` come before the mask.
    """
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", heads)
    if config.model_type == "gpt2":
        y = x @ state["c_attn.weight"] + state["c_attn.bias"]
        made = np.split(y, 3, -1)
    else:
        made = [x @ state[f"{n}_proj.weight"].T + state.get(f"{n}_proj.bias", 0.0) for n in "qkv"]
    shaped = [y.reshape(*x.shape[:2], n, -1) for y, n in zip(made, (heads, groups, groups), strict=True)]
    qs, ks, vs = (f(y) for f, y in zip((q, k, v), shaped, strict=True))
    if config.model_type != "gpt2":
        positions, theta = layout.position_ids.numpy(), config.rope_parameters["rope_theta"]
        qs, ks = (rotated(y, positions, theta) for y in (qs, ks))
    ks, vs = (np.repeat(y, heads // groups, axis=2) for y in (ks, vs))
    z = logits(np.einsum("bthd,bshd->bhts", qs, ks) / np.sqrt(qs.shape[-1]))
    p = probabilities(softmax(np.where(seen(layout)[:, None], z, -np.inf)))
    out = np.einsum("bhts,bshd->bthd", p, vs).reshape(*x.shape[:2], -1)
    if config.model_type == "gpt2":
        return out @ state["c_proj.weight"] + state["c_proj.bias"]
    return out @ state["o_proj.weight"].T


def seen(layout):
    """``[B, T, T]``: earlier tokens of the same group, in the prompt or in the same branch; padding sees itself."""
    g, b = layout.group.numpy(), layout.branch.numpy()
    see = np.zeros((*g.shape, g.shape[1]), bool)
    for r in range(g.shape[0]):
        for i in range(g.shape[1]):
            for j in range(i + 1):
                see[r, i, j] = i == j or (g[r, i] > 0 and g[r, i] == g[r, j] and b[r, j] in (0, b[r, i]))
    return see


def rows(kind):
    """``packed``: prompts with several answers, two in a row; ``plain``: right-padded texts."""
    rng = np.random.default_rng(0)

    def tokens(n):
        return rng.integers(5, 95, n).astype(np.int32)

    if kind == "plain":
        return collate([Item(tokens(n), np.ones(n, bool), id="x") for n in (7, 4)], pad_id=3)
    items = []
    for sizes in ((4, 3, 5), (2, 2), (6, 1, 2)):
        prompt, *answers = (tokens(n) for n in sizes)
        items.append(
            Item(prompt, np.zeros(len(prompt), bool), tuple(answers), tuple(np.ones(len(a), bool) for a in answers), "x")
        )
    return collate(items, pad_id=3, rows=[[0, 1], [2]])


def load(name, seed=1, attention="sdpa"):
    """A float64 model whose attention is not flat: larger random weights."""
    model = models.load(name, seed=seed).model.double().eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "attn" in n:
                p.add_(0.2 * torch.randn_like(p))
    model.set_attn_implementation(attention)
    return model


def apply(name, model, **options):
    """The model with the part ``model/<name>``."""
    return part.build("model", {name: options}).obj(model)


def attention_of(model, block=0):
    found = models.blocks(model)[block]
    return getattr(found, "self_attn", None) or found.attn


def states(model):
    """Plain weights of the first block's attention, by their names in a plain model."""
    return {n: array(p) for n, p in attention_of(model).named_parameters()}


def observe(model, layout):
    """Input and output of the first block's attention in a forward pass over the layout."""
    kept = {}

    def keep(module, args, kwargs, out):
        kept["x"], kept["y"] = array(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]), array(out[0])

    handle = attention_of(model).register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        hidden_states(model, layout)
    handle.remove()
    return kept["x"], kept["y"]


def check(part_name, family, kind, *, options=None, change=None, attention="sdpa", **maps):
    """The part's attention against the transcription; ``change(model)`` alters new parameters first."""
    model, layout = load(family, attention=attention), rows(kind)
    plain = states(model)
    model = apply(part_name, model, **(options or {}))
    if change:
        with torch.no_grad():
            change(model)
    x, y = observe(model, layout)
    assert_close(y, expected(plain, model.config, x, layout, **maps), layout)
    return model


def assert_close(y, want, layout, rtol=1e-5, atol=2e-5):
    """Equal at real tokens; what stands at padding is nobody's business."""
    real = layout.group.numpy() > 0
    np.testing.assert_allclose(y[real], want[real], rtol=rtol, atol=atol)


@pytest.fixture
def lab():
    """The helpers of this file by name."""
    return SimpleNamespace(**{k: v for k, v in globals().items() if callable(v) and not k.startswith("_")}, families=FAMILIES)


@pytest.fixture(params=FAMILIES)
def family(request):
    """A lab model of each family."""
    return request.param


@pytest.fixture(params=["plain", "packed"])
def kind(request):
    """A layout that needs a mask, and one that does not."""
    return request.param
