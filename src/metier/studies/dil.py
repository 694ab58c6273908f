"""Does fitting the density ratio of chosen answers keep their likelihood, at no cost of reward?

(i) Tables: chosen answers from a distribution p, rejected ones from the reference or from another. (ii) The bench's language
model on 4000 clean pairs: DPO (β 0.1), SimPO (β 2, γ 1) and DIL in its three forms, 200 steps of 32, four learning rates each
(the card has three: DPO at fewer steps preferred one with which it breaks down by 200), tried with one seed and as many steps,
then three other seeds. Log-probabilities are of 1000 held-out pairs; the perplexity is that
per token of 500 held-out answers of the fine-tuning mixture, and its rise is relative to the start.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metier.compare.study import Check, Outcome, Study
from metier.lab import preferencebench, tabular, wordpairs
from metier.studies._arms import LRS, Arm, Arms, gap, size, tries
from metier.studies._diverged import diverged

PARTS = ("objective/dil", "objective/dpo", "objective/simpo")
CLAIM = "Alignment as imitation of the chosen answers by a density ratio keeps their likelihood and is as good as DPO or better."
FORMS = ("lsif", "ukl", "bce")
RATES = (1e-4, *LRS)
STEPS = 200


def run(study: Study) -> Outcome:
    """Tables, then the language model."""
    texts = wordpairs.mixture(size(study, 500), "held-out")
    prompts, answers = (preferencebench.encode([t[k] for t in texts], end=k == "completion") for k in ("prompt", "completion"))

    def perplexity(bundle: Any, base: Any) -> Mapping[str, float]:
        from metier.core.klestimate import answer_stats
        from metier.lab.wordmodel import word_tokenizer

        pad = word_tokenizer().pad_token_id
        seen = answer_stats(bundle.model, base.model, prompts, [[a] for a in answers], pad)
        return {"perplexity_rise": math.exp(-seen["kl_mc"].sum() / seen["length"].sum()) - 1}

    data = {"clean": wordpairs.pairs(size(study, 4000))}
    bench = Arms(study, data, steps=STEPS, tuning=STEPS, more=perplexity)
    objectives: dict[str, Any] = {"dpo": {"dpo": {"beta": 0.1}}, "simpo": {"simpo": {"beta": 2.0, "gamma": 1.0}}}
    objectives |= {f: {"dil": {"f": f}} for f in FORMS}
    arms = {name: bench.tuned(tries([o], RATES)) for name, o in objectives.items()}
    return Outcome([*tables(), *checks(arms, bench.sd)], bench.report(**arms), [*bench.notes(**arms), *diverged(arms)])


# --- (i) -----------------------------------------------------------------------------------------------------


def tables() -> list[Check]:
    """Minimisers of the population losses."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, mu = ((0.7 * torch.randn(6, 5, generator=generator, dtype=torch.float64)).log_softmax(1) for _ in range(3))
    bench = replace(tabular.random_bench(prompts=6, answers=5), reference=mu)
    off = {f: _away(f, bench, chosen, mu, chosen) for f in FORMS}
    biased = _away("ukl", bench, chosen, rejected, ukl_optimum(chosen, rejected, mu))
    text = "tables: rejected answers of the reference, {} from the chosen distribution, largest total variation"
    return [
        *(Check(text.format(f.upper()), "< 1e-3", tv, tv < 1e-3) for f, tv in off.items()),
        Check("tables: other rejected answers, UKL from p/(p_r/μ + ν)", "< 1e-3", biased, biased < 1e-3),
    ]


def _away(f: str, bench: tabular.Bench, chosen: Tensor, rejected: Tensor, wanted: Tensor) -> float:
    weights = coupled(chosen.exp(), rejected.exp()) / len(chosen)
    found = tabular.minimise({"dil": {"f": f}}, bench, weights=weights).policy
    return float(tabular.total_variation(found, wanted).max())


def coupled(p: Tensor, q: Tensor) -> Tensor:
    """``[X, K, K]`` pairs of different answers with marginals p and q, by Sinkhorn's iteration (losses here see only these)."""
    found = 1 - torch.eye(p.shape[1], dtype=p.dtype).expand(len(p), -1, -1)
    for _ in range(3000):
        found = found * (p / found.sum(2)).unsqueeze(2)
        found = found * (q / found.sum(1)).unsqueeze(1)
    return found


def ukl_optimum(chosen: Tensor, rejected: Tensor, mu: Tensor) -> Tensor:
    """``log p/(p_r/μ + ν)`` with ν such that it sums to 1, by bisection."""
    ratio, p = (rejected - mu).exp(), chosen.exp()
    low, high = 1e-12 - ratio.amin(1, keepdim=True), torch.full((len(p), 1), 100.0, dtype=p.dtype)
    for _ in range(200):
        middle = (low + high) / 2
        above = (p / (ratio + middle)).sum(1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (p / (ratio + low)).log()


# --- (ii) ----------------------------------------------------------------------------------------------------


def checks(arms: dict[str, Arm], sd: float) -> list[Check]:
    """The card's expectations, for each form."""
    fall, rise = arms["dpo"].mean("chosen_change"), arms["dpo"].mean("perplexity_rise")
    found = [Check("DPO: change of the chosen log-probability, nats", "< 0", fall, fall < 0)]
    for f in FORMS:
        change, gold = arms[f].mean("chosen_change"), gap(arms[f], arms["dpo"], unit=sd)[0]
        own = arms[f].mean("perplexity_rise")
        found += [
            Check(f"{f.upper()}: change of the chosen log-probability, nats", ">= 0", change, change >= 0),
            Check(f"{f.upper()}: gold reward over DPO's, sd", ">= -0.1", gold, gold >= -0.1),
            Check(f"{f.upper()}: rise of the perplexity", f"<= half of DPO's {rise:.3g}", own, own <= rise / 2),
        ]
    return found
