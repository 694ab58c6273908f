"""The preference bench: a small fine-tuned model whose answers have a known gold reward.

    bundle = sft()                                      # the model ``lab/words-sft``, its tokenizer; trained once, cached
    rows = wordpairs.pairs(4000, seed, flip=0.3)        # or "lab/preferences-flipped", or a file
    tuned, figures = train("dpo", rows, lr=1e-3, steps=400, seed=0, folder=folder)
    tuned, figures = train({"ipo": {"tau": 0.1}}, …)    # objective as in a run file
    measure(tuned, bundle, words.prompts(128, split="held-out"), samples=512, reward="quality")
    measure_pairs(tuned, bundle, wordpairs.pairs(1000, split="held-out"))
    answerer(bundle, temperature=1.0)                   # draws answers from a model, for ``wordpairs.pairs(answers=…)``

``train`` goes through ``metier.train``: the run has the model, data, objective, optimizer and length given, and its folder
is an ordinary run folder. Its figures are those of ``measure`` and ``measure_pairs`` on held-out prompts and clean pairs.

Figures of ``measure`` (means over the sampled answers):
``gold_reward``, ``gold_sd`` (over answers), ``gold_se`` (of the mean, prompts as clusters), ``kl`` (Rao-Blackwellised KL to the
reference per answer, nats), ``kl_mc`` (mean log-ratio), ``length`` (tokens with the end token), ``degenerate`` (share with more
than half of the words repeated), ``ended``, ``good`` and ``bad`` (shares of those words), ``polite``, ``certain``, ``formal``,
``concrete`` (attributes in [-1, 1]), ``followed`` (of the control word, in [-1, 1]).

Figures of ``measure_pairs`` (the log-ratio to the reference, summed over tokens, is the implicit reward):
``accuracy`` (against the labels), ``gold_accuracy`` (against the gold reward, ties left out), ``margin``, ``chosen_change`` and
``rejected_change`` (mean change of the summed log-probabilities), ``longer`` (how often the preferred answer is the longer one).
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metier.core import models
from metier.core.config import PartRef
from metier.core.klestimate import answer_stats
from metier.core.sample import sample
from metier.lab import wordpairs, words

MODEL = "lab/words-sft"
MAX_NEW = 24
"""Tokens an answer may have; those of the data have at most 21 with the end token."""
Rows = Sequence[Mapping[str, Any]]


def sft(seed: int = 0, steps: int | None = None) -> models.Bundle:
    """The fine-tuned model; another ``seed`` or number of ``steps`` gives another checkpoint (a weaker one when short)."""
    bundle = models.load(MODEL)
    if seed or steps is not None:
        from safetensors.torch import load_file

        from metier.lab import wordmodel

        stored = load_file(wordmodel.trained(seed, wordmodel.STEPS if steps is None else steps))
        bundle.model.load_state_dict(stored, strict=False)  # the head is tied to the embedding
    return bundle


def encode(texts: Sequence[str], *, end: bool = False) -> list[np.ndarray]:
    """Token ids of prompts, or of answers with their ``end`` token."""
    from metier.lab.wordmodel import word_tokenizer

    tokenizer = word_tokenizer()
    found = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if len(texts) else []
    return [np.array([*ids, tokenizer.eos_token_id] if end else ids, np.int32) for ids in found]


def _module(model: Any) -> Any:
    """The model of a bundle (or of anything with ``bundle`` or ``model``), or the module itself."""
    model = getattr(model, "bundle", model)
    return model.model if isinstance(model, models.Bundle) else model


def draw(
    model: Any, prompts: Sequence[str], number: int = 1, *, seed: int = 0, temperature: float = 1.0, top_p: float = 1.0
) -> list[list[str]]:
    """``number`` answers to each prompt as texts."""
    from metier.lab.wordmodel import word_tokenizer

    answers = sample(
        _module(model), word_tokenizer(), encode(prompts), number=number, max_new_tokens=MAX_NEW, seed=seed,
        temperature=temperature, top_p=top_p,
    )  # fmt: skip
    return [[a.text for a in row] for row in answers]


def answerer(model: Any, *, temperature: float = 1.0, ahead: int = 8) -> wordpairs.Answerer:
    """Answers of a model for ``wordpairs.pairs(answers=…)``; ``ahead`` are drawn at once for each new prompt."""
    waiting: dict[str, list[str]] = {}

    def one(prompt: str, rng: random.Random) -> str:
        if not waiting.get(prompt):
            waiting[prompt] = draw(model, [prompt], ahead, seed=rng.randrange(2**31), temperature=temperature)[0]
        return waiting[prompt].pop()

    return one


def sampled_pairs(
    model: Any, number: int = 4000, seed: int = 0, *, split: words.Split = "train", temperature: float = 1.0, **labels: Any
) -> list[dict[str, Any]]:
    """Rows as of ``wordpairs.pairs`` whose answers are the model's own; ``labels`` go to ``wordpairs.label``. Equal answers
    are left out, so there are slightly fewer than ``number`` rows."""
    rng = random.Random(f"sampled pairs {seed}")
    prompts = words.prompts(number, f"sampled {seed}", split=split)
    both = draw(model, prompts, 2, seed=seed, temperature=temperature)
    kept = [(p, a, b) for p, (a, b) in zip(prompts, both, strict=True) if a != b and a and b]
    return [wordpairs.label(p, a, b, rng, **labels) for p, a, b in kept]


# --- measures --------------------------------------------------------------------------------------------------------


def measure(
    model: Any, reference: Any, prompts: Sequence[str], *, samples: int = 512, reward: str | words.Reward = "quality",
    seed: int = 0, temperature: float = 1.0,
) -> dict[str, float]:  # fmt: skip
    """Figures of ``samples`` answers, spread evenly over the prompts; see the module's docstring.

    ``model`` and ``reference`` are bundles or modules; ``reference=None`` leaves the KL out. The KL figures are estimates of the
    policy's KL at temperature 1 only.
    """
    from metier.lab.wordmodel import word_tokenizer

    policy, tokenizer = _module(model), word_tokenizer()
    prompts = list(prompts)[:samples]
    ids, number = encode(prompts), max(1, samples // len(prompts))
    answers = sample(policy, tokenizer, ids, number=number, max_new_tokens=MAX_NEW, seed=seed, temperature=temperature)
    r = words.gold(reward)
    gold = np.array([[r(p, a.text) for a in row] for p, row in zip(prompts, answers, strict=True)])
    out = {
        "gold_reward": gold.mean(), "gold_sd": gold.std(), "gold_se": gold.mean(1).std() / np.sqrt(len(gold)),
        "length": np.mean([len(a.ids) for row in answers for a in row]),
        "ended": np.mean([a.ended for row in answers for a in row]),
    }  # fmt: skip
    if reference is not None:
        stats = answer_stats(policy, _module(reference), ids, answers, tokenizer.pad_token_id)
        out |= {"kl": stats["kl"].mean(), "kl_mc": stats["kl_mc"].mean()}
    out |= _style([(p, a.text) for p, row in zip(prompts, answers, strict=True) for a in row])
    return {k: float(v) for k, v in out.items()}


def _style(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    texts = [a for _, a in pairs]
    kinds = [words.sentiment(w) for a in texts for w in a.split()] or [None]
    shown = np.mean([words.attributes(a) for a in texts], axis=0)
    asked = [words.followed(p, a) for p, a in pairs if set(p.split()) & set(words.CONTROLS)] or [0]
    return {
        "degenerate": float(np.mean([words.degenerate(a) for a in texts])),
        "good": kinds.count("good") / len(kinds), "bad": kinds.count("bad") / len(kinds),
        **dict(zip(words.ATTRIBUTES, map(float, shown), strict=True)), "followed": float(np.mean(asked)),
    }  # fmt: skip


def measure_pairs(model: Any, reference: Any, rows: Rows) -> dict[str, float]:
    """Figures of the implicit reward on rows of ``wordpairs.pairs``; see the module's docstring."""
    from metier.lab.wordmodel import word_tokenizer

    answers = [encode([r[k] for r in rows], end=True) for k in ("chosen", "rejected")]
    stats = answer_stats(
        _module(model), _module(reference), encode([r["prompt"] for r in rows]), list(zip(*answers, strict=True)),
        word_tokenizer().pad_token_id,
    )  # fmt: skip
    chosen, rejected = stats["kl_mc"].T
    margin = chosen - rejected
    gold = np.array([r.get("gold_chosen", np.nan) - r.get("gold_rejected", np.nan) for r in rows])
    told = np.abs(gold) > 0
    lengths = stats["length"][:, 0] - stats["length"][:, 1]
    return {
        "accuracy": _rate(margin), "gold_accuracy": _rate(margin[told] * np.sign(gold[told])) if told.any() else float("nan"),
        "margin": float(margin.mean()), "chosen_change": float(chosen.mean()), "rejected_change": float(rejected.mean()),
        "longer": _rate(margin[lengths != 0] * np.sign(lengths[lengths != 0])),
    }  # fmt: skip


def _rate(values: np.ndarray) -> float:
    """Share of positive values; a zero counts one half."""
    return float(np.mean((values > 0) + 0.5 * (values == 0))) if len(values) else float("nan")


# --- training --------------------------------------------------------------------------------------------------------


def train(
    objective: PartRef, data: Rows | str, *, lr: float, steps: int = 400, seed: int = 0, folder: str | Path, batch: int = 32,
    optimizer: str = "adamw", schedule: PartRef = "cosine", adapter: PartRef | None = None, model: str = MODEL,
    reference: str | None = None, prompts: Sequence[str] | None = None, held_out: Rows | None = None,
    reward: str | words.Reward = "quality", samples: int = 512, overrides: Sequence[str] = (),
) -> tuple[models.Bundle, dict[str, float]]:  # fmt: skip
    """Train with the real engine and measure: ``(tuned bundle, figures)``.

    ``data`` are rows of any format metier reads, or what ``data.train`` of a run file may name. ``prompts`` (default: 128
    held-out ones) and ``held_out`` (default: 1000 clean pairs of other prompts; ``[]`` for none) are measured against
    ``model`` as the reference. A finished run of the same settings in ``folder`` is not trained again.
    """
    from metier.core.api import train as run_training
    from metier.core.trained import open_run

    folder = Path(folder)
    given = data if isinstance(data, str) else _written(data, folder)
    run = {
        "model": model, "data": {"train": given, "max_length": 128}, "objective": objective,
        "optimizer": {optimizer: {"lr": lr}}, "schedule": schedule,
        "train": {"steps": steps, "batch": batch, "micro_batch": batch, "seed": seed, "log_every": 10},
    }  # fmt: skip
    run |= {k: v for k, v in (("adapter", adapter), ("reference", reference)) if v is not None}
    result = run_training(run, overrides, out=folder, quiet=True, handle_signals=False)
    tuned = open_run(folder).bundle
    base = models.load(model)
    figures = measure(
        tuned,
        base,
        words.prompts(128, "measured", split="held-out") if prompts is None else prompts,
        samples=samples,
        reward=reward,
    )
    if held_out is None:
        held_out = wordpairs.pairs(1000, "measured", split="held-out")
    if len(held_out):
        figures |= measure_pairs(tuned, base, held_out)
    return tuned, {**figures, "loss": result.metrics.get("loss", float("nan")), "steps": result.step}


def _written(rows: Rows, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)
