"""From a result to one word per arm, and the sentence that says why.

The word is read off the 95 % interval of the paired difference, nothing else:

- **holds**: the whole interval is better than the control by more than the minimum effect;
- **direction**: the whole interval is better, but part of it by less than the minimum effect;
- **against**: the whole interval is worse;
- **unclear**: the interval contains no difference, or there is none to judge by.

With several arms each word uses its own plain interval; ``p_holm`` says how it fares among them all.
"""

from dataclasses import dataclass
from typing import Literal

from metier.compare import stats, text
from metier.compare.results import ComparisonResult
from metier.compare.stats import Paired

Word = Literal["holds", "direction", "unclear", "against"]


@dataclass(frozen=True)
class Verdict:
    """What a comparison says about one arm. Numbers are *arm − control* in units of the metric."""

    arm: str
    control: str
    word: Word
    effect: float | None
    low: float | None
    high: float | None
    text: str
    """One sentence for people."""
    n: int
    p: float | None
    p_signflip: float | None
    p_holm: float | None
    failed: int
    """Runs of the arm that failed; they count as the worst."""
    failed_control: int

    @property
    def effect_text(self) -> str:
        """``−0.052 [−0.071, −0.033]``."""
        return effect_text(self.effect, self.low, self.high)


def judge(result: ComparisonResult) -> list[Verdict]:
    """One verdict per arm other than the control, in the order of the arms."""
    return [_judge(result, p) for p in stats.paired(result)]


def word(low: float | None, high: float | None, *, lower_is_better: bool, minimum_effect: float) -> Word:
    """The word for an interval of *arm − control*."""
    if low is None or high is None:
        return "unclear"
    least, most = (-high, -low) if lower_is_better else (low, high)
    if least > 0:
        return "holds" if least > minimum_effect else "direction"
    return "against" if most < 0 else "unclear"


def effect_text(effect: float | None, low: float | None, high: float | None) -> str:
    """A difference with its interval, with as many digits as the interval supports."""
    if effect is None:
        return "–"
    if low is None or high is None:
        return text.fixed(effect, text.decimals(None, effect), sign=True)
    places = text.decimals((high - low) / 2, effect)
    mean, left, right = (text.fixed(v, places, sign=True) for v in (effect, low, high))
    return f"{mean} [{left}, {right}]"


def _judge(result: ComparisonResult, p: Paired) -> Verdict:
    chosen = word(p.low, p.high, lower_is_better=result.lower_is_better, minimum_effect=result.minimum_effect)
    sentence = " ".join(filter(None, [_sentence(result, p, chosen), _failures(p)]))
    return Verdict(
        arm=p.arm, control=p.control, word=chosen, effect=p.mean, low=p.low, high=p.high, text=sentence,
        n=p.n, p=p.p, p_signflip=p.p_signflip, p_holm=p.p_holm,
        failed=p.failed, failed_control=p.failed_control,
    )  # fmt: skip


def _sentence(result: ComparisonResult, p: Paired, chosen: Word) -> str:
    labels = {a.name: a.label for a in result.arms}
    arm, control, metric = labels[p.arm], labels[p.control], result.metric
    if p.mean is None:
        return f"Nothing can be said about {arm}: no run reached a final {metric}."
    if not any(p.differences):
        return f"{arm} and {control} end with the same {metric} on {_every(p.n)}."
    if p.low is None or p.high is None:
        return _without_interval(arm, control, metric, p)
    places = text.decimals((p.high - p.low) / 2, p.mean)
    if chosen == "unclear":
        mean, low, high = (text.fixed(v, places, sign=True) for v in (p.mean, p.low, p.high))
        return (
            f"No clear difference in {metric} between {arm} and {control}: {mean} "
            f"(95 % interval {low} to {high}, {text.counted(p.n, 'seed')})."
        )
    small, mean, large = (text.fixed(v, places) for v in sorted((abs(p.low), abs(p.mean), abs(p.high))))
    size = f"{mean} (95 % interval {small} to {large}, {text.counted(p.n, 'seed')})"
    side = "lower" if p.mean < 0 else "higher"
    return f"{arm} ends with a {side} {metric} than {control}, by {size}{_against_minimum(result, chosen)}."


def _against_minimum(result: ComparisonResult, chosen: Word) -> str:
    if chosen == "against":
        return ", which is worse"
    if not result.minimum_effect:
        return ""
    asked = f"{result.minimum_effect:g}"
    if chosen == "holds":
        return f": more than the {asked} asked for"
    return f": better, but perhaps by less than the {asked} asked for"


def _without_interval(arm: str, control: str, metric: str, p: Paired) -> str:
    assert p.mean is not None
    size = text.fixed(p.mean, text.decimals(None, p.mean), sign=True)
    if p.n == 1:
        return f"{arm} differs from {control} by {size} in {metric}, but one seed gives no interval."
    return (
        f"{arm} differs from {control} by the same {size} in {metric} on {_every(p.n)}, "
        "but seeds without spread give no interval."
    )


def _every(n: int) -> str:
    return "the one seed" if n == 1 else f"all {n} seeds"


def _failures(p: Paired) -> str:
    counts = [(p.arm, p.failed), (p.control, p.failed_control)]
    planned = max(p.n, p.failed, p.failed_control)
    told = [f"{arm} failed on {k} of {text.counted(planned, 'seed')}" for arm, k in counts if k]
    if not told:
        return ""
    return f"{' and '.join(told)}" + ("; a failed run counts as the worst." if p.n else ".")
