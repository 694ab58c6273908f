"""ALMA's components on their own, for the study of the card: demonstrations, pools of checkpoints, judges."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metier.compare.study import Check, Study
from metier.core import models, part
from metier.core.config import PartRef
from metier.core.sample import sample
from metier.lab import preferencebench, words
from metier.parts.source import _alma
from metier.parts.source._alma import averaged
from metier.parts.source._pairs import judged, reward_of
from metier.studies import _self_training as own

NOISY = """import numpy as np

from metier.lab.words import quality

rng = np.random.default_rng({seed})


def grade(prompt, answer):
    return float(np.clip(np.rint(4.5 + 3 * quality(prompt, answer) + rng.normal(0, {noise})), 1, 8))


def judge(prompts, completions, answers):
    return [[grade(p, c) for c in own] for p, own in zip(prompts, completions)]
"""
NOISE = 3.0
"""Sd of one grade, on the scale of 1 to 8; a gold reward of 1 is 3 grades."""
TASKS = (
    "Name three rivers in Africa.", "Explain how a violin makes sound.", "Write a short poem about rain.",
    "List the steps to bake bread.", "What is the capital of Peru?", "Translate 'good morning' into French.",
    "Suggest a gift for a gardener.", "Why is the sky blue?", "Describe your ideal holiday.", "How do vaccines work?",
    "Give me a tip for better sleep.", "Write an email asking for a day off.", "Compare cats and dogs as pets.",
    "Sort these numbers: 4, 9, 1.", "Invent a name for a bakery.", "What should I pack for a hike?",
)  # fmt: skip


def noisy(folder: Path, seed: int) -> PartRef:
    """A judge of eight grades with noise, whose judgements differ from call to call."""
    return own.judge(folder, NOISY.format(seed=seed, noise=NOISE), f"noisy-{seed}")


# --- prompts --------------------------------------------------------------------------------------------------------


def synthetic(model: models.Bundle, fixed: bool, number: int, demos: int, tokens: int, seed: int = 0) -> list[str]:
    """New prompts of a language model from demonstrations, the same ones for all calls or drawn anew for each."""
    rng = np.random.default_rng(seed)
    draw = lambda: [TASKS[i] for i in rng.choice(len(TASKS), demos, replace=False)]  # noqa: E731
    shown = [draw()] * number if fixed else [draw() for _ in range(number)]
    ids = [np.array(model.tokenizer(_alma.few_shot(d))["input_ids"], np.int32) for d in shown]
    answers = sample(model.model, model.tokenizer, ids, number=1, max_new_tokens=tokens, seed=seed)
    return [text for (a,) in answers if (text := a.text.partition("\n")[0].strip())]


def distinct_two(texts: Sequence[str]) -> float:
    """Share of different ones among all word bigrams."""
    grams = [g for t in texts for g in zip(t.lower().split(), t.lower().split()[1:], strict=False)]
    return len(set(grams)) / max(1, len(grams))


@torch.no_grad()
def spread(model: models.Bundle, texts: Sequence[str]) -> float:
    """Mean cosine distance of two texts, each embedded as the mean of the model's last hidden states."""
    rows = []
    for text in texts:
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        rows.append(models.backbone(model.model)(input_ids=ids).last_hidden_state[0].double().mean(0))
    x = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    number = len(x)
    return float(1 - ((x @ x.T).sum() - number) / (number * (number - 1)))


# --- pools ----------------------------------------------------------------------------------------------------------


def best_of_pool(pool: Sequence[Any], total: int, prompts: Sequence[str], seed: int) -> float:
    """Mean gold reward of the best of ``total`` answers, drawn in equal shares from the models."""
    found: list[list[str]] = [[] for _ in prompts]
    for i, (model, number) in enumerate(zip(pool, _alma.shares(total, len(pool)), strict=True)):
        drawn = preferencebench.draw(model, prompts, number, seed=seed + i)
        found = [a + b for a, b in zip(found, drawn, strict=True)]
    return own.mean(max(own.GOLD(p, t) for t in texts) for p, texts in zip(prompts, found, strict=True))


# --- judges ---------------------------------------------------------------------------------------------------------


def judges(study: Study, base: models.Bundle) -> tuple[list[Check], dict[str, Any]]:
    """Pair accuracy of one grade, of means of 16, and of a reward model of pairs that are labelled by such means."""
    train, test, steps = (40, 40, 3) if study.quick else (1200, 500, 60)
    judge = reward_of(noisy(study.folder, 1), "study", "judge")
    asked, answers = _two_answers(base, train, "train")
    rows = [
        {"prompt": p, "chosen": a[int(np.argmax(s))], "rejected": a[int(np.argmin(s))]}
        for p, a, s in zip(asked, answers, _grades(judge, asked, answers, 16), strict=True) if s[0] != s[1]
    ]  # fmt: skip
    data = own.written(study.folder / "judged.jsonl", rows)
    head = own.trained(study, "head", {
        "model": own.MODEL, "data": {"train": data, "max_length": 64}, "objective": "bradley-terry",
        **own.settings(1e-3, steps, 32, 0),
    })  # fmt: skip
    distilled = part.build("reward", {"reward-model": {"model": str(head), "device": "cpu"}}).obj
    held = _two_answers(base, test, "held-out")
    gold = np.array([[own.GOLD(p, a) for a in pair] for p, pair in zip(*held, strict=True)])
    scores = {"raw": _grades(judge, *held, 1), "distilled": _grades(distilled, *held, 1), "averaged": _grades(judge, *held, 16)}
    found = accuracies(gold, scores)
    ordered, gap = found["raw"] < found["distilled"] <= found["averaged"], found["distilled"] - found["raw"]
    return [
        Check("raw, distilled, averaged accuracy", "raw < distilled <= averaged", list(found.values()), ordered),
        Check("distilled over raw accuracy", ">= 0.05", gap, gap >= 0.05),
    ], {"judge_accuracy": found}  # fmt: skip


def _grades(judge: Any, prompts: list[str], answers: list[list[str]], samples: int) -> np.ndarray:
    """Mean of ``samples`` judgements ``[N, 2]``."""
    return averaged([np.stack(judged(judge, prompts, answers, None)) for _ in range(samples)])


def _two_answers(base: models.Bundle, number: int, split: Any) -> tuple[list[str], list[list[str]]]:
    """Prompts and two different answers of the start to each."""
    asked = words.prompts(number, "judge", split=split)
    drawn = preferencebench.draw(base, asked, 2, seed=3)
    kept = [(p, a) for p, a in zip(asked, drawn, strict=True) if a[0] != a[1] and all(a)]
    return [p for p, _ in kept], [a for _, a in kept]


def accuracies(gold: np.ndarray, scores: dict[str, np.ndarray]) -> dict[str, float]:
    """How often each judge orders the pairs ``[N, 2]`` as the gold reward does; its ties count one half."""
    told = gold[:, 0] != gold[:, 1]
    sign = np.sign(gold[told, 0] - gold[told, 1])
    return {name: own.right((s[told, 0] - s[told, 1]) * sign) for name, s in scores.items()}
