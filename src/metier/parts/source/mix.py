"""Mixing named inputs by weight, with a temperature (arXiv:1907.05019, section 4)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from metier.core.errors import UsageError, unknown
from metier.core.part import NonNegative, Positive, part


@part("source/mix", paper="arXiv:1907.05019", rows=(62,))
class Mix:
    """Draw from several inputs in fixed proportions ``p_i = w_i^(1/T) / sum_j w_j^(1/T)``.

    Without ``weights`` an input weighs as many as it has examples, so ``temperature`` 1 is plain
    concatenation and larger values favour small inputs. ``exact`` takes the input that lags its share most
    (largest deficit), so the counts of every prefix stay within two of ``p_i n``; ``sampled`` draws each
    choice from ``p``. Proportions count examples, not tokens.

    ``first_exhausted`` ends an epoch before any example repeats; ``all_exhausted`` when every input has been
    seen whole, smaller ones repeating in a new order each pass.
    """

    def __init__(
        self,
        *,
        weights: dict[str, NonNegative] | None = None,
        temperature: Positive = 1.0,
        choice: Literal["exact", "sampled"] = "exact",
        stop: Literal["first_exhausted", "all_exhausted"] = "all_exhausted",
    ) -> None:
        if weights is not None and not any(weights.values()):
            raise UsageError("every weight is 0: nothing would be drawn", where="source/mix.weights")
        self.weights, self.temperature, self.choice, self.stop = weights, temperature, choice, stop

    def shares(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """Share of every input that is drawn from, by name, given how many examples each holds.

        Raises ``UsageError`` for a weight of an unknown input, an input without a weight, and an empty input.
        """
        weights = dict(sizes) if self.weights is None else self.weights
        for name in weights:
            if name not in sizes:
                raise unknown("input", name, sizes, where="source/mix.weights")
        if left := sorted(set(sizes) - set(weights)):
            raise UsageError(f"no weight for {', '.join(left)}", where="source/mix.weights", hint="Use 0 to leave one out.")
        used = {name: w for name, w in weights.items() if w > 0}
        if empty := [name for name in used if sizes[name] == 0]:
            raise UsageError(f"{', '.join(empty)} holds no examples", where="source/mix")
        if not used:
            raise UsageError("no input holds an example", where="source/mix")
        logs = np.log(np.array(list(used.values()), dtype=np.float64)) / self.temperature
        powers = np.exp(logs - logs.max())
        return dict(zip(used, (powers / powers.sum()).tolist(), strict=True))

    def stream(
        self,
        inputs: Mapping[str, Sequence[Any]],
        *,
        epoch: int,
        rng: np.random.Generator,
        progress: Callable[[], float],
    ) -> Iterator[Any]:
        """One epoch of examples; a function of ``rng``'s seed only."""
        share = self.shares({name: len(rows) for name, rows in inputs.items()})
        names = list(share)
        # Each input has its own stream, so that its order does not depend on how the others are drawn.
        order = {name: child for name, child in zip(names, rng.spawn(len(names)), strict=True)}
        passes = {name: iter(order[name].permutation(len(inputs[name]))) for name in names}
        left = {name: len(inputs[name]) for name in names}
        for name in self._choices(np.array(list(share.values())), names, rng):
            index = next(passes[name], None)
            if index is None:
                passes[name] = iter(order[name].permutation(len(inputs[name])))
                index = next(passes[name])
            yield inputs[name][int(index)]
            left[name] -= 1
            done = (n <= 0 for n in left.values())
            if any(done) if self.stop == "first_exhausted" else all(done):
                return

    def _choices(self, p: np.ndarray, names: list[str], rng: np.random.Generator) -> Iterator[str]:
        taken = np.zeros(len(p))
        for drawn in iter(lambda: int(taken.sum()) + 1, 0):
            # Rounding keeps ties of equal shares in the order of the inputs, on every machine.
            furthest = np.argmax(np.round(p * drawn - taken, 9))
            i = int(rng.choice(len(p), p=p) if self.choice == "sampled" else furthest)
            taken[i] += 1
            yield names[i]
