"""Scores of the positions that carry loss, computed without a ``[B, T, V]`` tensor.

Hidden states are gathered at those positions first; the output layer then runs over chunks of them, forward and
backward. Prompt and padding positions never reach it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metier.core import aux, batches, models
from metier.core.batch import Batch, Labels, Rewards, Tokens
from metier.core.errors import UsageError
from metier.core.forward import Embed, extra, hidden_states, is_causal, tokens
from metier.core.layout import Layout

CHUNK_BYTES = 64 * 2**20
"""Memory for one chunk of logits; when all of them fit, probabilities are kept for the backward pass."""
Transform = Callable[[Tensor], Tensor]
Reference = Callable[[Layout, bool], Tensor]
"""``(layout, whole logits?) -> [N]`` log-probabilities or ``[N, V]`` logits under the reference model."""


class _LinearLogps(torch.autograd.Function):
    """``logp_i = z_i[y_i] - logsumexp(z_i)``, ``z = h Wᵀ + b``, in chunks of rows.

    Per row, ``∂logp/∂h = W[y] - pᵀW`` does not depend on the incoming gradient, so it is formed in the forward pass
    while the logits exist; with a frozen output layer the backward pass multiplies and is done.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rows: int) -> Tensor:
        logps, kept = [], []
        wants_h, wants_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        keep = wants_w and rows >= h.shape[0]
        slope = torch.empty_like(h) if wants_h else None
        for begin in range(0, h.shape[0], rows):
            part = slice(begin, begin + rows)
            logp, p = _softmax_rows(h[part], weight, bias, target[part], wants_h or keep)
            logps.append(logp)
            if p is not None and slope is not None:
                slope[part] = F.embedding(target[part], weight) - p.to(weight.dtype) @ weight
            if keep and p is not None:
                kept.append(p)
        ctx.rows = rows
        ctx.wants_w = wants_w
        ctx.save_for_backward(h, weight, bias, target, slope, *kept)
        return torch.cat(logps) if logps else _float(h.new_zeros(0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        h, weight, bias, target, slope, *kept = ctx.saved_tensors
        g = grads[0]
        if torch.is_grad_enabled():  # somebody differentiates twice: let autograd do it, with all logits at once
            leaves = [x for x, used in zip((h, weight, bias), ctx.needs_input_grad, strict=False) if used]
            found = iter(torch.autograd.grad(_picked(_float(F.linear(h, weight, bias)), target), leaves, g, create_graph=True))
            return *(next(found) if used else None for used in ctx.needs_input_grad[:3]), None, None
        grad_h = slope * g.unsqueeze(1).to(slope.dtype) if slope is not None else None
        if not ctx.wants_w:
            return grad_h, None, None, None, None
        grad_w = torch.zeros_like(_float(weight)) if ctx.needs_input_grad[1] else None
        grad_b = torch.zeros_like(_float(bias)) if bias is not None and ctx.needs_input_grad[2] else None
        with torch.autocast(h.device.type, enabled=False):
            for begin in range(0, h.shape[0], ctx.rows):
                part = slice(begin, begin + ctx.rows)
                p = kept[0] if kept else _softmax_rows(h[part], weight, bias, target[part], True)[1]
                assert p is not None
                d = p * -g[part].unsqueeze(1).to(p.dtype)
                d[torch.arange(d.shape[0], device=d.device), target[part]] += g[part].to(d.dtype)
                if grad_w is not None:  # half-precision chunks are summed in float32
                    grad_w = _add_product(grad_w, d.to(weight.dtype).T, h[part])
                if grad_b is not None:
                    grad_b += d.sum(0)
        grad_w, grad_b = (None if x is None else x.to(weight.dtype) for x in (grad_w, grad_b))
        return grad_h, grad_w, grad_b, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return total.addmm_(a, b) if total.dtype == a.dtype else total.add_(a @ b)


def _softmax_rows(
    h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, probabilities: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and, when wanted, all probabilities; in float32 (float64 stays)."""
    z = F.linear(h, weight, bias)
    z = _float(z)
    lse = torch.logsumexp(z, dim=1)
    logp = z.gather(1, target.unsqueeze(1)).squeeze(1) - lse
    return logp, torch.exp_(z.sub_(lse.unsqueeze(1))) if probabilities else None


def linear_logps(
    h: Tensor,
    output: nn.Module,
    target: Tensor,
    *,
    transform: Transform | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Log-probabilities ``[N]`` of ``target`` ``[N]`` from hidden states ``h`` ``[N, D]`` and the output layer.

    Works for any module ``D -> V``; a plain linear layer without a logit transform takes the chunked path. A second
    derivative is right too, but takes all logits at once.
    """
    if transform is None and _is_plain(output):
        linear: Any = output
        weight, bias = linear.weight, linear.bias
        if torch.is_autocast_enabled(h.device.type):
            kind = torch.get_autocast_dtype(h.device.type)
            h, weight, bias = h.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
        rows = max(1, chunk_bytes // (4 * weight.shape[0]))
        with torch.autocast(h.device.type, enabled=False):
            return _LinearLogps.apply(h, weight, bias, target, rows)  # type: ignore[return-value]
    z = _float(output(h))
    z = transform(z) if transform else z
    return _picked(z, target)


def _is_plain(output: nn.Module) -> bool:
    """A linear layer that nothing listens to, so that using its weights directly is the same as calling it."""
    return type(output) is nn.Linear and not (output._forward_hooks or output._forward_pre_hooks)


def _float(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def target_states(model: nn.Module, layout: Layout, *, embed: Embed | None = None) -> Tensor:
    """Hidden states ``[N, D]`` of the positions that predict the targets."""
    return hidden_states(model, layout, embed=embed)[layout.row, layout.col]


def _logps(model: nn.Module, h: Tensor, layout: Layout) -> Tensor:
    return linear_logps(h, models.head(model), layout.target, transform=models.logit_transform(model))


def head_logits(model: nn.Module, h: Tensor) -> Tensor:
    """Logit rows ``[N, V]`` of hidden states ``[N, D]``."""
    z = _float(models.head(model)(h))
    transform = models.logit_transform(model)
    return transform(z) if transform else z


def token_logps(model: nn.Module, layout: Layout, *, embed: Embed | None = None) -> Tensor:
    """Log-probability ``[N]`` of every target."""
    return _logps(model, target_states(model, layout, embed=embed), layout)


def token_logits(model: nn.Module, layout: Layout, *, embed: Embed | None = None) -> Tensor:
    """Logit rows ``[N, V]`` of every target."""
    return head_logits(model, target_states(model, layout, embed=embed))


def row_chunks(model: Any, h: Tensor) -> Sequence[Tensor]:
    """Hidden states ``[N, D]`` in pieces whose logits fit in ``CHUNK_BYTES``."""
    return h.split(max(1, CHUNK_BYTES // (4 * model.config.vocab_size)))


@torch.no_grad()
def log_collision(model: nn.Module, h: Tensor) -> Tensor:
    """``log Σ_v p(v)²`` ``[N]`` of the distributions that hidden states ``[N, D]`` give; no gradient."""
    found = [torch.logsumexp(2 * torch.log_softmax(head_logits(model, rows), 1), 1) for rows in row_chunks(model, h)]
    return torch.cat(found)


@torch.no_grad()
def drawn_targets(model: nn.Module, layout: Layout, generator: torch.Generator) -> Tensor:
    """``[N]`` tokens drawn from the model's distribution at the positions that predict the targets."""
    h = target_states(model, layout)
    drawn = [
        torch.multinomial(head_logits(model, x).softmax(-1), 1, generator=generator).squeeze(1) for x in row_chunks(model, h)
    ]
    return torch.cat(drawn) if drawn else layout.target


def class_logits(model: Any, layout: Layout, *, embed: Embed | None = None) -> Tensor:
    """Class logits ``[B, C]`` of a sequence classifier, one row per example.

    A causal model is read at the last real token; this needs the layout, since a model that only sees embeddings cannot
    tell padding.
    """
    if is_causal(model) and isinstance(getattr(model, "score", None), nn.Linear):
        h = hidden_states(model, layout, embed=embed)
        last = (layout.group > 0).sum(1) - 1
        return _float(model.score(h[torch.arange(len(last), device=last.device), last]))
    inputs = {
        **tokens(model, layout, embed),
        "attention_mask": (layout.group > 0).long(),
        **extra(model, layout),
    }
    return _float(model(**inputs).logits)


def answer_rewards(model: Any, layout: Layout) -> Tensor:
    """What a reward model's scalar head says ``[S]`` at the last token of every answer."""
    if layout.end is None or not isinstance(getattr(model, "score", None), nn.Linear):
        raise UsageError(
            f"{model.config.model_type} has no scalar head on each token",
            hint="Reward models are causal models with a score head, as transformers' …ForSequenceClassification builds them.",
        )
    h = hidden_states(model, layout)[layout.end[:, 0], layout.end[:, 1]]
    return _float(model.score(h)).squeeze(-1)


def score(
    model: nn.Module, layout: Layout, kind: type, *, reference: Reference | None = None,
    needs: frozenset[str] = frozenset(), embed: Embed | None = None,
) -> Batch:  # fmt: skip
    """Score a layout as the batch type that an objective reads."""
    if kind is Labels:
        assert layout.label is not None
        return Labels(class_logits(model, layout, embed=embed), layout.label)
    if kind is Rewards:
        return batches.rewards(layout, answer_rewards(model, layout))
    return batches.assemble(layout, token_scores(model, layout, reference=reference, needs=needs, embed=embed), kind, needs)


def token_scores(
    model: nn.Module, layout: Layout, *, reference: Reference | None = None, needs: frozenset[str] = frozenset(),
    embed: Embed | None = None,
) -> Tokens:  # fmt: skip
    """Everything about each target that ``needs`` asks for, from one pass of the model and one of the reference."""
    h = target_states(model, layout, embed=embed)
    logits = head_logits(model, h) if "logits" in needs else None
    logps = _logps(model, h, layout) if logits is None else _picked(logits, layout.target)
    ref, ref_logits = _under_reference(layout, reference, needs)
    weights = layout.weight if layout.weight is not None else torch.ones_like(logps)
    return Tokens(
        logps, weights, layout.sequence, ref, logits, layout.target if logits is not None else None, ref_logits,
        log_collision(model, h.detach()) if "collision" in needs else None,
    )  # fmt: skip


def _picked(logits: Tensor, target: Tensor) -> Tensor:
    """Log-probabilities ``[N]`` of the targets from logit rows ``[N, V]``."""
    return logits.gather(1, target.unsqueeze(1)).squeeze(1) - torch.logsumexp(logits, dim=1)


def _under_reference(layout: Layout, reference: Reference | None, needs: frozenset[str]) -> tuple[Tensor | None, Tensor | None]:
    """Log-probabilities and, when wanted too, logit rows under the reference model, in one pass."""
    if "reference" not in needs:
        return None, None
    if layout.reference is not None and "logits" not in needs:
        return layout.reference, None
    assert reference is not None, "the session provides a reference when a part needs one"
    if "logits" not in needs:
        return reference(layout, False), None
    logits = reference(layout, True)
    return _picked(logits, layout.target), logits


@dataclass(frozen=True)
class FrozenScorer:
    """A :data:`Reference` that says which model it asks, and how that is switched to what it was."""

    model: nn.Module
    disabled: Callable[[], AbstractContextManager]
    prepared: Callable[[Layout], Layout] | None = None
    """What is done to a layout first."""

    def __call__(self, layout: Layout, logits: bool) -> Tensor:
        """``[N]`` log-probabilities or ``[N, V]`` logits."""
        layout = layout if self.prepared is None else self.prepared(layout)
        with torch.no_grad(), self.disabled(), evaluating(self.model), aux.collect(layout):  # its own, thrown away
            return token_logits(self.model, layout) if logits else token_logps(self.model, layout)


def reference_scorer(model: nn.Module, disabled: Callable[[], AbstractContextManager]) -> FrozenScorer:
    """Scores under a frozen model, or under the trained one while ``disabled()`` switches its adapter off."""
    return FrozenScorer(model, disabled)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off; every module's mode is put back afterwards."""
    training = [m for m in model.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True
