"""DeepSeekMoE: many narrow routed experts beside shared ones (arXiv:2401.06066), routed as in DeepSeek-V3
(arXiv:2412.19437, section 2.1.2) and balanced without a loss (arXiv:2408.15664)."""

import copy
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metier.core import aux, models
from metier.core.errors import UsageError
from metier.core.part import Count, Index, NonNegative, Positive, part

ALPHA = {"loss-free": 1e-4, "auxiliary": 1e-2, "none": 0.0}


@part("model/deepseek-moe", paper="arXiv:2401.06066", rows=(12,))
class DeepseekMoe:
    """MLPs become many narrow experts, of which a router picks a few per token, and shared ones.

    ``y = Σ_s FFN_s(x) + Σ_{i ∈ TopK} g_i FFN_i(x)``, affinities ``s_i = sigmoid(x·e_i)`` in float32. Experts are chosen by
    ``s_i + b_i``; with ``n_group`` > 1 inside the ``topk_group`` groups whose two best experts have the largest sum. Gates
    come from ``s`` alone: ``g_i = scale s_i / (Σ_TopK s + 1e-20)``, or ``scale s_i`` without ``norm_topk`` (with one expert
    per token the former is constant, and the router learns nothing). ``width`` of an expert: by default the MLP's divided
    by ``n_shared + top_k``, which keeps the active parameters; ``dense_first`` blocks keep their MLP. Experts see their own
    tokens only. V3: 256 routed, 1 shared, top 8, 4 of 8 groups, scale 2.5, 3 dense blocks.

    ``balance: loss-free``: after each optimizer step ``b_i += speed · sign(mean load - load_i)``; loads are counted over
    the step and all processes, without padding. ``b`` is a float32 buffer that checkpoints hold; a frozen router's
    stays. ``alpha`` weighs the sequence-wise loss ``Σ_i f_i P_i``, ``f_i = N_r/(K T) Σ_t 1[i ∈ TopK_t]``,
    ``P_i = mean_t s_i / Σ_j s_j``, averaged over sequences, summed over layers (metric ``balance``); by default 1e-4, with
    ``auxiliary`` 1e-2, with ``none`` 0. Metric ``max_violation``: the layers' largest ``max_i load_i / mean load - 1``.

    Names are those of DeepSeek's release. New weights come from N(0, initializer_range²). Changes the model in place.
    Raises ``UsageError`` for a model without gated MLPs and sizes that do not fit."""

    def __init__(
        self, *, n_routed: Count = 16, n_shared: Index = 1, top_k: Count = 3, width: Count | None = None, n_group: Count = 1,
        topk_group: Count = 1, scale: Positive = 1.0, norm_topk: bool = True, dense_first: Index = 1, speed: NonNegative = 1e-3,
        balance: Literal["loss-free", "auxiliary", "none"] = "loss-free", alpha: NonNegative | None = None,
    ) -> None:  # fmt: skip
        if n_routed % n_group or topk_group > n_group or top_k > n_routed // n_group * topk_group:
            what = f"{n_routed} experts in {n_group} groups do not give {top_k} from {topk_group} groups"
            raise UsageError(what, where="model/deepseek-moe")
        self.n_routed, self.n_shared, self.top_k, self.width, self.dense_first = n_routed, n_shared, top_k, width, dense_first
        self.n_group, self.topk_group, self.scale, self.norm_topk = n_group, topk_group, scale, norm_topk
        self.speed, self.alpha = speed if balance == "loss-free" else 0.0, ALPHA[balance] if alpha is None else alpha

    def __call__(self, model: Any) -> Any:
        """The model with experts in all blocks but the first ``dense_first``."""
        blocks: list[Any] = models.blocks(model)[self.dense_first :]
        if not blocks or any(type(getattr(getattr(b, "mlp", None), "gate_proj", None)) is not nn.Linear for b in blocks):
            raise UsageError(f"no gated MLPs after {self.dense_first} blocks of the model", where="model/deepseek-moe")
        for block in blocks:
            block.mlp = Experts(block.mlp, model.config, self)
        return model

    def on_step(self, ctx: Any) -> None:
        """Report the balance of the step."""
        ctx.metrics["max_violation"] = max(float(m.violation) for m in ctx.model.modules() if isinstance(m, Experts))


def route(x: Tensor, weight: Tensor, bias: Tensor, o: DeepseekMoe) -> tuple[Tensor, Tensor, Tensor]:
    """``x [n, D]`` -> affinities ``[n, N]``, experts ``[n, K]`` and gates ``[n, K]``."""
    kind = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        scores = nn.functional.linear(x.to(kind), weight.to(kind)).sigmoid()
    choice = (scores.detach() + bias).unflatten(1, (o.n_group, -1))
    if o.n_group > 1:
        best = choice.topk(min(2, choice.shape[2]), dim=-1).values.sum(-1).topk(o.topk_group, dim=-1).indices
        out = torch.ones(choice.shape[:2], dtype=torch.bool, device=x.device).scatter(1, best, False)
        choice = choice.masked_fill(out.unsqueeze(-1), -torch.inf)  # not 0: biased scores may be negative
    chosen = choice.flatten(1).topk(o.top_k, dim=-1).indices
    gates = scores.gather(1, chosen)
    return scores, chosen, o.scale * (gates / (gates.sum(-1, keepdim=True) + 1e-20) if o.norm_topk else gates)


class Experts(nn.Module):
    """The experts of one block, with the router's bookkeeping."""

    def __init__(self, mlp: Any, config: Any, options: DeepseekMoe) -> None:
        super().__init__()
        self.options, self.violation, like = options, torch.zeros(()), mlp.gate_proj.weight
        width = options.width or max(1, len(like) // (options.n_shared + options.top_k))
        self.gate, self.experts = nn.Module(), nn.Module()  # no ModuleList: a model's longest one is taken for its blocks
        self.gate.weight = nn.Parameter(like.new_empty(options.n_routed, like.shape[1]).normal_(std=config.initializer_range))
        bias = torch.zeros(options.n_routed, dtype=torch.float32, device=like.device)  # steps of 1e-3 vanish in half precision
        self.gate.register_buffer("e_score_correction_bias", bias)
        for i in range(options.n_routed):
            self.experts.add_module(str(i), _narrow(mlp, config, width))
        self.shared_experts = _narrow(mlp, config, width * options.n_shared) if options.n_shared else None
        self.register_buffer("load", torch.zeros_like(bias, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[R, T, D]`` -> ``[R, T, D]``."""
        flat = x.flatten(0, 1)
        bias = self.gate.get_buffer("e_score_correction_bias")
        scores, chosen, gates = route(flat, self.gate.get_parameter("weight"), bias, self.options)
        if self.training:
            self._observe(scores, chosen, x.shape[:2])
        order, sizes = chosen.flatten().argsort(stable=True), torch.bincount(chosen.flatten(), minlength=len(bias)).tolist()
        token = order // chosen.shape[1]
        # An expert without tokens is computed on none: its gradient is zero and not absent, which data parallelism needs.
        out = torch.cat([e(p) for e, p in zip(self.experts.children(), flat[token].split(sizes), strict=True)])
        y = out.new_zeros(flat.shape).index_add(0, token, out * gates.flatten()[order].unsqueeze(1).to(out.dtype)).view(x.shape)
        return y if self.shared_experts is None else y + self.shared_experts(x)

    def _observe(self, scores: Tensor, chosen: Tensor, shape: torch.Size) -> None:
        """Count the loads of a training pass and add its sequence-wise loss."""
        layout = aux.layout()
        group = torch.ones(shape, dtype=torch.int64, device=chosen.device) if layout is None else layout.group
        again = torch._C._current_graph_task_id() != -1  # a checkpointed block computed again during backward
        if not again and (torch.is_grad_enabled() if layout is None else not layout.filler):
            self.get_buffer("load").add_(torch.bincount(chosen[group.flatten() > 0].flatten(), minlength=scores.shape[1]))
        if self.options.alpha and layout is not None:
            aux.add("balance", sequence_loss(scores, chosen, group), self.options.alpha)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the selection biases toward equal load; called once after each optimizer step."""
        load = self.get_buffer("load").clone()
        self.get_buffer("load").zero_()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(load)
        self.violation = len(load) * load.max() / load.sum().clamp(min=1) - 1
        if self.gate.get_parameter("weight").requires_grad:
            up = torch.sign(load.sum() - len(load) * load)
            self.gate.get_buffer("e_score_correction_bias").add_(up, alpha=self.options.speed)


def sequence_loss(scores: Tensor, chosen: Tensor, group: Tensor) -> Tensor:
    """``Σ_i f_i P_i`` averaged over the sequences; ``group [R, T]`` numbers them within a row, 0 is padding."""
    real, first = group.flatten() > 0, torch.arange(len(group), device=group.device).unsqueeze(1) * (group.max() + 1)
    of = (first + group).flatten()[real].unique(return_inverse=True)[1]
    length = torch.bincount(of).to(scores.dtype).unsqueeze(1)
    zeros, hits = scores.new_zeros(len(length), scores.shape[1]), torch.zeros_like(scores).scatter(1, chosen, 1.0)
    f = zeros.index_add(0, of, hits[real]) * (scores.shape[1] / chosen.shape[1]) / length
    p = zeros.index_add(0, of, (scores / scores.sum(-1, keepdim=True))[real]) / length
    return (f * p).sum() / len(length)


def _narrow(mlp: Any, config: Any, width: int) -> nn.Module:
    """A gated MLP like ``mlp`` of another width, without biases, with new weights."""
    config = copy.copy(config)
    config.intermediate_size, config.mlp_bias = width, False
    made = type(mlp)(config).to(mlp.gate_proj.weight)
    for weight in made.parameters():
        nn.init.normal_(weight, std=config.initializer_range)
    return made
