"""Pairs of the word language from answers of a pool of models, judged by the exact reward; the same prompts for every arm."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metier.compare.study import Study
from metier.core import part
from metier.core.context import derive_seed
from metier.core.data.examples import Preference, Prompted
from metier.lab import preferencebench as lab
from metier.lab import words

REWARD = '''"""The exact lexicon reward."""
from metier.lab import words


def gold(prompts, completions, answers):
    return [[words.lexicon(p, c) for c in row] for p, row in zip(prompts, completions)]
'''
DRAWN, PAIRS, ANSWERS = 1150, 1000, 4
Members = Sequence[tuple[Any, float]]
"""Models with the temperature that each answers at."""


def same_prompts(study: Study, arms: Mapping[str, Members], split: words.Split, seed: int) -> dict[str, list[Preference]]:
    """1000 pairs of every arm, to the first prompts where all arms have an answer better than another, in their order."""
    drawn, kept = (60, 24) if study.quick else (DRAWN, PAIRS)
    prompts = words.prompts(drawn, f"judged {seed}", split=split)
    found = {name: judged(study, members, prompts, seed) for name, members in arms.items()}
    common = sorted(set.intersection(*map(set, found.values())))[:kept]
    assert len(common) == kept, f"only {len(common)} of {drawn} prompts have a pair in every arm"
    return {name: [own[i] for i in common] for name, own in found.items()}


def judged(study: Study, members: Members, prompts: Sequence[str], seed: int) -> dict[int, Preference]:
    """Prompt -> the pair that the exact reward makes of four answers; prompts whose answers are equally good have none."""
    file = study.folder / "reward.py"
    file.write_text(REWARD, encoding="utf-8")
    rows = [
        Prompted(prompt, id=str(i), meta={"completions": texts})
        for i, (prompt, own) in enumerate(zip(prompts, answers(members, prompts, seed), strict=True))
        if len(texts := list(dict.fromkeys(t for t in own if t.strip()))) > 1
    ]
    made = pairs(rows, {"aspects": {"gold": {"python": {"function": f"{file}:gold"}}}})
    return {int(e.id.split("#")[0]): e for e in made}


def answers(members: Members, prompts: Sequence[str], seed: int) -> list[list[str]]:
    """Four answers to each prompt, by four members without replacement or all by the only one, in random order of members.

    Every member has a seed of its own: with one for all, their answers to a prompt would be drawn with the same uniform numbers.
    """
    rng, each = np.random.default_rng(seed), -(-ANSWERS // len(members))
    by = [rng.permutation(len(members))[:ANSWERS].tolist() for _ in prompts]
    found: dict[tuple[int, int], list[str]] = {}
    for k, (model, temperature) in enumerate(members):
        asked = [i for i, own in enumerate(by) if k in own]
        own = [prompts[i] for i in asked]
        drawn = lab.draw(model, own, each, seed=derive_seed("judged", seed, k), temperature=temperature)
        found |= {(i, k): texts for i, texts in zip(asked, drawn, strict=True)}
    return [[t for k in own for t in found[i, k]] for i, own in enumerate(by)]


def pairs(rows: Sequence[Prompted], options: dict[str, Any] | None = None) -> list[Preference]:
    """What ``source/ultrafeedback`` makes of rows with several answers."""
    source = part.build("source", {"ultrafeedback": options or {}}).obj
    return list(source.stream({"rows": rows}, epoch=0, rng=np.random.default_rng(0), progress=lambda: 0.0))
