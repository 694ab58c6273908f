"""Who says which of two answers is better: the data, a reward part, a language model, or the run that is probed."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from metier.core.batch import Rewards
from metier.core.config import PartRef
from metier.core.data.collate import collate
from metier.core.data.encode import Item
from metier.core.data.examples import Preference, Prompt, Ranked
from metier.core.errors import UsageError
from metier.core.judging import known_answers, shown
from metier.core.part import build
from metier.core.preferencefit import order_averaged
from metier.core.preferences import log_ratios, means
from metier.core.probing import Probe
from metier.core.scores import evaluating, token_logits
from metier.parts.probe._preferences import said

Labels = Literal["data", "run"]
QUESTION = """Two answers to a request are to be compared.

Request:
{prompt}

Response A:
{a}

Response B:
{b}

Which response is better?"""
LEAD = "The better response is Response"


def choices(
    probe: Probe, found: Sequence[Preference], *, labels: Labels, judge: PartRef | None, pairwise: bool, judge_model: str | None,
    given: bool,
) -> np.ndarray:  # fmt: skip
    """For each pair 1 when the answer called chosen is preferred, 0 when the other one, ½ undecided.

    The judges, of whom one may be named: a reward part, asked in both orders; a language model by name, likewise; the run
    (``labels: run``): its reward model, or log-ratios to the reference, or token means without one. ``given``: the pairs are
    not those of the run.
    """
    if (judge is not None) + (judge_model is not None) + (labels == "run") > 1:
        raise UsageError("judge, judge_model and labels: run each name a judge", hint="Leave one of them.")
    if judge is not None:
        return by_reward(judge, found, pairwise)
    if judge_model is not None:
        from metier.core import models

        return order_averaged(*by_letters(models.load(judge_model), found))
    if labels == "run":
        if given:
            raise UsageError("labels: run judges the run's own pairs", hint="Leave data out.")
        return _by_run(probe)[: len(found)]
    return np.ones(len(found))


def by_reward(judge: PartRef, found: Sequence[Preference], pairwise: bool) -> np.ndarray:
    """Choices of a reward part. ``pairwise``: its first score of two answers is the probability that the first is better."""
    reward = build("reward", judge).obj

    def both(swap: bool) -> np.ndarray:
        pairs = [[e.rejected, e.chosen] if swap else [e.chosen, e.rejected] for e in found]
        scores = reward(asked(reward, found), pairs, known_answers(found))
        scores = np.asarray(torch.as_tensor(scores).double())[:, :2]
        return np.stack([scores[:, 0], 1 - scores[:, 0]], 1) if pairwise else scores

    return order_averaged(both(False), both(True))


def asked(reward: Any, found: Sequence[Preference | Ranked]) -> list[Prompt]:
    """The prompts of examples as a reward part reads them."""
    return shown(reward, [e.prompt for e in found])


def by_letters(bundle: Any, found: Sequence[Preference], batch: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities ``[N, 2]`` of the tokens A and B after "Response", with the chosen answer as A and as B.

    Raises ``UsageError`` when the letters are no single tokens there.
    """
    tokenizer = bundle.tokenizer
    shown = [
        _asked(tokenizer, QUESTION.format(prompt=said(e.prompt), a=a, b=b))
        for x, y in (("chosen", "rejected"), ("rejected", "chosen"))
        for e in found
        for a, b in [(getattr(e, x), getattr(e, y))]
    ]
    letters = [_letter(tokenizer, shown[0], x) for x in (" A", " B")]
    out = []
    for i in range(0, len(shown), batch):
        ids = [
            np.array([*tokenizer(s, add_special_tokens=False)["input_ids"], letters[0]], np.int32) for s in shown[i : i + batch]
        ]
        items = [Item(x, np.arange(len(x)) == len(x) - 1, (), (), str(k)) for k, x in enumerate(ids)]
        layout = collate(items, pad_id=tokenizer.pad_token_id or 0).to(next(bundle.model.parameters()).device)
        with torch.no_grad(), evaluating(bundle.model):
            out.append(token_logits(bundle.model, layout).double().softmax(1)[:, letters].cpu().numpy())
    table = np.concatenate(out)
    return table[: len(found)], table[len(found) :]


def _asked(tokenizer: Any, question: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        return f"{question}\n\n{LEAD}"
    turn = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + LEAD


def _letter(tokenizer: Any, before: str, letter: str) -> int:
    short, long = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (before, before + letter))
    if len(long) != len(short) + 1 or long[:-1] != short:
        raise UsageError(f"{letter.strip()!r} is no single token after {LEAD.split()[-1]!r} for this judge", where="judge_model")
    return long[-1]


def _by_run(probe: Probe) -> np.ndarray:
    module: Any = getattr(probe.module, "module", probe.module)
    gaps = []
    for layout in probe.layouts:
        with torch.no_grad(), probe.engine.autocast():
            b = module.score(layout.to(probe.engine.device))
        if isinstance(b, Rewards):
            gaps.append(b.chosen - b.rejected)
        else:
            high, low = log_ratios(b) if b.ref_chosen_logps is not None else means(b)
            gaps.append(high - low)
    return (torch.sign(torch.cat(gaps).double()) / 2 + 0.5).cpu().numpy()
