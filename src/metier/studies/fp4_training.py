"""Is training in simulated FP4 close to full precision, and do the gradient estimator and clamped outliers bring it there?

A Llama of 0.3 M parameters from scratch, AdamW at one learning rate without tuning, cosine with 5 % warmup, same tokens for all
arms, two seeds. Once as it is, once with outliers (where seeds change the data alone): 2 % of the channels feeding each linear
layer, at least one, are 20 times larger and the weights that read them 20 times smaller, which leaves the function. The factor
sits in the norms' gains and the rows of ``v_proj`` and ``up_proj``, which are trained, instead of being fixed. ``direct``
rounds both operands without estimator or clamp, with a scale per token and output channel or per tensor; ``w4`` and ``a4``
round only weights or activations. Fidelity is that of the full-precision model after training, on held-out text, with scales
per token and the paper's quantiles per tensor: of 64 channels a quantile of 0.999 per token clamps none.

Smaller than the card's check: 100 steps of 16 x 64 tokens instead of 300; no weight-only arms with outliers. So few steps show
coarse differences, not the paper's gap of 0.05 to 0.1 nat after 100 B tokens. OCC clamps one or two of 64 or 176 channels.
"""

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from metier.compare import stats
from metier.compare.study import Check, Outcome, Study
from metier.core import config as configs
from metier.core import models, part, probing
from metier.core.session import open_session

PARTS = ("model/fp4", "probe/quantization-fidelity")
CLAIM = "FP4 training with DGE and OCC ends near full precision; direct rounding leaves a clear gap, and outliers need clamping."
STE: dict[str, Any] = {"weights": "ste", "activations": "direct"}
TENSOR = {"act_group": "tensor", "weight_group": "tensor"}
ARMS: dict[str, dict[str, Any]] = {
    "full": {}, "dge-occ": {}, "direct-vector": STE, "direct-tensor": {**STE, **TENSOR},
    "a4-direct": {"weights": "none", "activations": "direct"}, "a4-clamp": {"weights": "none", "activations": "clamp"},
    "a4-occ": {"weights": "none"}, "w4-ste": {"weights": "ste", "activations": "none"}, "w4-dge": {"activations": "none"},
}  # fmt: skip
SETTINGS = ("plain", "outliers")
CHAIN = ("full", "dge-occ", "direct-vector", "direct-tensor")
LADDER = ((1.0, False), (0.999, False), (0.999, True), (0.99, True), (0.97, True))  # in the card's order of fidelity


def run(study: Study) -> Outcome:
    """Both settings trained, then fidelity in both."""
    name = "lab/llama-50k" if study.quick else "lab/llama-300k"
    names = {"plain": name, "outliers": with_outliers(study, name)}
    results = {s: study.compare(design(study, names[s], s), name=s) for s in SETTINGS}
    losses = {s: {a.name: stats.values(r, a.name) for a in r.arms} for s, r in results.items()}
    loss = {s: {arm: mean(values) for arm, values in found.items()} for s, found in losses.items()}
    fidelity = {s: measured(study, names[s], s) for s in SETTINGS}
    checks = [c for s in SETTINGS for c in training(loss[s], s)]
    a4 = [loss["outliers"][n] for n in ("a4-direct", "a4-clamp", "a4-occ")]
    text = "loss of activation-only FP4 without clamp, with clamp, with OCC (outliers)"
    checks.append(Check(text, "first is highest, or not finite", a4, a4[0] == float("inf") or a4[0] > max(a4[1:])))
    checks += [c for s in SETTINGS for c in rising(fidelity[s]["mean"], s)]
    gain = {s: v["w4-ste"] - v["w4-dge"] for s, v in loss.items() if "w4-ste" in v}
    return Outcome(checks=checks, figures={"losses": losses, "w4_ste_minus_w4_dge": gain, "fidelity": fidelity})


def with_outliers(study: Study, name: str) -> str:
    """Folder of the model with large channels."""
    bundle, folder = models.load(name, seed=0), study.folder / "outliers-model"
    for block in models.blocks(bundle.model):
        enlarge(block, bundle.model.config)
    models.save(bundle, folder)
    return str(folder)


@torch.no_grad()
def enlarge(block: Any, config: Any, factor: float = 20.0) -> None:
    """Multiply 2 % of the channels between a block's layers by ``factor`` and divide the weights that read them."""
    attention, mlp = block.self_attn, block.mlp
    first, second = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
    for writer, readers in (
        (block.input_layernorm, first), (block.post_attention_layernorm, second), (mlp.up_proj, (mlp.down_proj,)),
    ):  # fmt: skip
        at = chosen(len(writer.weight))
        writer.weight[at] *= factor
        for reader in readers:
            reader.weight[:, at] /= factor
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    at = chosen(attention.v_proj.out_features)
    attention.v_proj.weight[at] *= factor
    for i in at.tolist():  # each head of values is read once for every query head that shares it
        read = [(i // size * (heads // groups) + j) * size + i % size for j in range(heads // groups)]
        attention.o_proj.weight[:, read] /= factor


def chosen(n: int) -> torch.Tensor:
    """2 % of ``n`` channels, at least one, spread evenly."""
    count = max(1, round(0.02 * n))
    return (torch.arange(count) * n + n // 2) // count


def config(study: Study, model: str) -> dict[str, Any]:
    """The run file that all arms share."""
    quick = study.quick
    return {
        "model": model, "optimizer": {"adamw": {"lr": 4e-3}}, "schedule": {"cosine": {"warmup": 0.05}},
        "data": {"train": "lab/python", "eval_fraction": 0.05, "eval_limit": 8 if quick else 64, "chunk": True, "max_length": 64},
        "train": {"steps": 4 if quick else 100, "batch": 4 if quick else 16},
    }  # fmt: skip


def design(study: Study, model: str, setting: str) -> dict[str, Any]:
    """The arms of a setting."""
    arms = {n: {"transform": [{"fp4": o}]} for n, o in ARMS.items() if setting == "plain" or not n.startswith("w4")}
    return {
        "run": config(study, model), "control": "full", "factor": "transform", "tune": None, "seeds": 1 if study.quick else 2,
        "arms": {**arms, "full": {"transform": []}},
    }  # fmt: skip


def mean(losses: list[float | None]) -> float:
    """Mean final loss; infinite when a run failed."""
    ran = [x for x in losses if x is not None]
    return sum(ran) / len(ran) if ran and len(ran) == len(losses) else float("inf")


def training(loss: Mapping[str, float], setting: str) -> list[Check]:
    """The card's order, and the half of the gap."""
    chain, text = [loss[a] for a in CHAIN], f"gap of dge-occ to full over that of direct-vector ({setting})"
    gap, direct = loss["dge-occ"] - loss["full"], loss["direct-vector"] - loss["full"]
    share = gap / direct if direct > 0 else None
    return [
        Check(f"loss of {', '.join(CHAIN)} ({setting})", "rising", chain, all(a < b for a, b in pairwise(chain))),
        Check(text, "<= 0.5", share, share is not None and share <= 0.5),
    ]


def measured(study: Study, model: str, setting: str) -> dict[str, Any]:
    """What the probe says of the full-precision model after training; kept in the study's folder."""
    kept = study.folder / f"fidelity-{setting}.json"
    if not kept.is_file():
        ready, folder = configs.load(config(study, model), []), study.folder / f"fidelity-{setting}"
        with open_session(*ready, folder, quiet=True, fresh=True, handle_signals=False) as session:
            session.train(keep_weights=False)
            with probing.undisturbed(probing.probe_session(session)) as probe:
                found = part.build("probe", {"quantization-fidelity": {"quantile": "tensor"}}).obj(probe)
        kept.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def rising(rows: list[dict[str, Any]], setting: str) -> list[Check]:
    """Is fidelity monotone along the card's ladder?"""
    at = {(r["alpha"], r["compensate"]): r for r in rows}
    text = ", ".join("no clamp" if a == 1 else f"{a}{' + rest' if c else ''}" for a, c in LADDER)
    values = {key: [at[s][key] for s in LADDER] for key in ("cosine", "snr", "mse")}
    up = {key: all((a > b) if key == "mse" else (a < b) for a, b in pairwise(v)) for key, v in values.items()}
    return [Check(f"{k} with {text} ({setting})", "falling" if k == "mse" else "rising", v, up[k]) for k, v in values.items()]
