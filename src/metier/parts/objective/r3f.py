"""R3F: predictions must not change under small noise on the embeddings (arXiv:2008.03156, section 3)."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Labels, Tokens
from metier.core.errors import UsageError
from metier.core.layout import Layout
from metier.core.part import NonNegative, Positive, part


@part("objective/r3f", paper="arXiv:2008.03156", rows=(152,), needs=("logits",))
class R3F:
    """``-log p(y|x) + weight (KL(p|q) + KL(q|p))`` with ``p`` from clean and ``q`` from noised embeddings.

    The noise is ``U(-scale, scale)`` or ``N(0, scale^2)`` per entry, drawn afresh at every call; both passes
    use the same dropout masks, and gradients flow through both. ``over`` is what carries loss: tokens, or the
    class of a sequence. Costs a second forward pass and whole logit rows.
    """

    def __init__(
        self,
        *,
        weight: NonNegative = 1.0,
        scale: Positive = 1e-5,
        noise: Literal["uniform", "normal"] = "uniform",
        over: Literal["tokens", "classes"] = "tokens",
    ) -> None:
        self.weight, self.scale, self.noise, self.over = weight, scale, noise, over
        self.reads = Tokens if over == "tokens" else Labels

    def __call__(self, forward: Callable[..., Any], layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss ``[N]`` (tokens) or ``[B]`` (classes), and the divergence of each unit."""
        seed = int(torch.randint(2**62, ()))
        device = layout.input_ids.device
        with _random_state_restored(device):
            clean = forward(layout)
        noised = forward(layout, embed=lambda e: self.perturb(e, seed))
        divergence = symmetric_kl(clean.logits, noised.logits)
        if isinstance(clean, Tokens):
            divergence = divergence * clean.weights
            base = -clean.logps * clean.weights
        else:
            base = F.cross_entropy(clean.logits, clean.label, reduction="none")
        return base + self.weight * divergence, {"divergence": divergence, "base_loss": base}

    def perturb(self, embedded: Tensor, seed: int) -> Tensor:
        """Embeddings ``[R, T, d]`` with noise. Raises ``UsageError`` in half precision, which would round it
        away."""
        if embedded.element_size() < 4:
            raise UsageError(
                f"noise of {self.scale:g} is lost in {str(embedded.dtype).removeprefix('torch.')} embeddings",
                where="objective/r3f", hint="Use dtype: fp32 (train.precision: bf16 is fine).",
            )  # fmt: skip
        generator = torch.Generator(device=embedded.device).manual_seed(seed)
        noise = torch.empty_like(embedded)
        if self.noise == "uniform":
            noise.uniform_(-self.scale, self.scale, generator=generator)
        else:
            noise.normal_(0, self.scale, generator=generator)
        return embedded + noise


def symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    """``KL(p|q) + KL(q|p)`` of the softmaxes of two logit tensors ``[N, V]``; ``[N]``."""
    a, b = (x.float() if x.element_size() < 4 else x for x in (a, b))
    p, q = F.log_softmax(a, -1), F.log_softmax(b, -1)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1)


def _random_state_restored(device: torch.device) -> Any:
    """The next pass draws the same dropout masks as the one inside."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
