"""What tests of sources that play games share: rock, paper, scissors, and a policy that says what it is told to."""

import numpy as np
import torch

from metier.core.sample import Answer

BEATS = {("paper", "rock"): 0.9, ("scissors", "paper"): 0.8, ("rock", "scissors"): 0.7}
P = {**BEATS, **{(b, a): 1 - p for (a, b), p in BEATS.items()}}


class Game:
    """A pairwise judge with a liking for the first place."""

    def __init__(self, bonus=0.0):
        self.bonus = bonus

    def __call__(self, prompts, completions, answers):
        return torch.tensor([[P.get((a, b), 0.5) + self.bonus, 0.0] for a, b in completions], dtype=torch.float64)


def _answer(text):
    text, ended = text if isinstance(text, tuple) else (text, True)
    return Answer(np.zeros(1, np.int32), text, ended, np.zeros(1, np.float32))


class said:
    """A policy whose own answers are ``own`` and whose mixtures' answers are ``others``, for every prompt."""

    def __init__(self, own, others):
        self.own, self.others, self.calls = own, others, []

    def sample(self, prompts, number, *, max_new_tokens, seed, mixed=0.0):
        self.calls.append({"number": number, "mixed": mixed, "seed": seed, "max_new_tokens": max_new_tokens})
        texts = self.own if len(self.calls) % 2 else self.others
        return [[_answer(t) for t in texts] for _ in prompts]
