"""Does a loss found by evolution for noisy labels beat DPO and ORPO there, and does it carry over to a language model?

(i) A contextual bandit, new for every task: 64 prompts, 16 answers each with 32 features, gold reward linear in them, answers
drawn from a linear reference policy, 256 pairs with Bradley-Terry labels of which 30 % are flipped. A policy linear in the
features is trained on them from the reference for 150 full-batch steps of Adam. Its fitness is the exact expected gold reward,
told as the regret against the best answers. (ii) β of DPO and λ of ORPO are chosen on ten tasks. The search starts from that
DPO (other weights small): φ and ψ of nine basis functions, g of seven, β and λ_s, 27 numbers; 40 generations of 32
antithetic pairs, all on the same two tasks, new ones in each generation. Of its means after every tenth generation the best one
on the ten tasks is kept. A second search of the same size has weights that change in the course of training (TA-MPO, 53
numbers). (iii) All are compared on 20 further tasks, and on 20 clean ones. (iv) The kept loss, as a file of coefficients, trains
the bench's language model for 200 steps of 32 pairs, 30 % of them flipped; DPO's β, ORPO's λ and the found loss's β are chosen
among four with one seed and 100 steps on other prompts than those of the final figures, then three other seeds are run.
Chosen values at an end of their sweep are in the notes: ORPO on the bandit does best where its odds ratio outweighs all else.

The search's step size and the weights from which it starts were settled in four earlier trials; the tasks of (iii) were renewed
after them, and none of these trials has seen them.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from metier.compare.study import Check, Outcome, Study
from metier.core.evolution import Evolution, Settings
from metier.core.preferences import log_odds
from metier.lab import wordpairs
from metier.parts.objective._mirror import OF_U, OF_Z, Coefficients, Curve, Shape, Term, loss
from metier.parts.objective.mirror_po import write
from metier.studies._arms import Arms, size, tries

PARTS = ("objective/mirror-po", "objective/dpo", "objective/orpo")
CLAIM = "Losses found by evolution strategies beat DPO and ORPO on data with known flaws, and carry over to language models."
PROMPTS, ANSWERS, FEATURES, PAIRS, SCALE = 64, 16, 32, 256, 1.5
STEPS, LR, FLIPS = 150, 0.1, 0.3
TRAIN, CHOOSE, TEST, CLEAN = 1_000_000, 2_000_000, 7_000_000, 8_000_000  # first seeds of tasks
BETAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
LAMBDAS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 1e4)
U_TERMS = [(n, (0.5,) if n == "tanh" else ()) for n in OF_U if n != "unit"]
Z_TERMS = [("logsig", (1.0,)), ("logsig", (0.25,)), ("logsig", (4.0,)), ("softplus", (1.0,)), ("linear", ()),
           ("half-square", (1.0,)), ("exp", ())]  # fmt: skip
FAINT, ABSENT, ALONE, STRIDE = -3.0, -7.0, 2.0, 3.0
"""Raw weights of what hardly counts at the start, of ``inverse`` (-1/u is large where u is small) and λ_s, and of DPO's own
functions; raw weights per unit of the searched vector."""
Loss = Callable[[tuple[Tensor, Tensor], tuple[Tensor, Tensor], float], Tensor]
"""Log-probabilities of chosen and rejected answers ``[P, pairs]``, of the reference ``[1, pairs]``, time -> loss."""


def run(study: Study) -> Outcome:
    """Search, comparison, transfer."""
    sizes = Sizes(generations=2, pairs=4, tasks=2, steps=20) if study.quick else Sizes()
    bench = Bench(sizes)
    found = {name: bench.search(moving) for name, moving in (("static", False), ("moving", True))}
    checks, figures = compared(bench, found)
    more, moved, notes = transfer(study, bench.coefficients(found["static"].vector, moving=False))
    for name, value, tried in (("DPO's β", bench.beta, BETAS), ("ORPO's λ", bench.lam, LAMBDAS)):
        if value in (tried[0], tried[-1]):
            notes.append(f"{name} on the bandit, {value:g}, is at an end of its sweep.")
    notes += [
        "Before this run four settings of the search were tried. The first (other weights from -7, Adam 0.1) ran whole, on other "
        "test tasks: 2.6 % less regret than DPO at 2.1 standard errors. The kept one (from -3, Adam 0.03) was taken because its "
        "progress was steady, not because it scored best.",
    ]
    return Outcome([*checks, *more], {**figures, **moved}, notes)


@dataclass(frozen=True)
class Sizes:
    """How much."""

    generations: int = 40
    pairs: int = 32
    tasks: int = 20
    steps: int = STEPS

    @property
    def choose(self) -> range:
        """Tasks on which everything is chosen."""
        return range(CHOOSE, CHOOSE + self.tasks // 2)


# --- the bandit ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Features ``[X, K, d]``, gold reward and reference log-policy ``[X, K]``, flat places of both answers of each pair."""

    features: Tensor
    reward: Tensor
    reference: Tensor
    chosen: Tensor
    rejected: Tensor


def task(seed: int, flips: float = FLIPS) -> Task:
    """A bandit with its labelled pairs."""
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(PROMPTS, ANSWERS, FEATURES, generator=rng) / FEATURES**0.5
    reward, reference = (features @ torch.randn(FEATURES, generator=rng) for _ in range(2))
    reward, reference = SCALE * (reward - reward.mean()) / reward.std(), reference.log_softmax(-1)
    x = torch.randint(PROMPTS, (PAIRS,), generator=rng)
    y = torch.multinomial(reference[x].exp(), 2, generator=rng)
    gap = reward[x, y[:, 0]] - reward[x, y[:, 1]]
    first = (torch.rand(PAIRS, generator=rng) < gap.sigmoid()) ^ (torch.rand(PAIRS, generator=rng) < flips)
    w = torch.where(first, y[:, 0], y[:, 1])
    return Task(features, reward, reference, x * ANSWERS + w, x * ANSWERS + y.sum(1) - w)


def regret(objective: Loss, size: int, t: Task, steps: int) -> np.ndarray:
    """Regret ``[P]`` of ``size`` policies trained side by side, each with its own loss."""
    weights = torch.zeros(size, FEATURES, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=LR)
    flat, start = t.features.reshape(-1, FEATURES).T.contiguous(), t.reference.flatten()
    frozen = start[None, t.chosen], start[None, t.rejected]

    def policy() -> Tensor:
        return (start + weights @ flat).view(size, PROMPTS, ANSWERS).log_softmax(-1)

    for step in range(steps):
        logp = policy().flatten(1)
        optimizer.zero_grad()
        objective((logp[:, t.chosen], logp[:, t.rejected]), frozen, step / steps).mean(1).sum().backward()
        optimizer.step()
    with torch.no_grad():
        return (t.reward.max(-1).values - (policy().exp() * t.reward).sum(-1)).mean(1).double().numpy()


def dpo(betas: Sequence[float]) -> Loss:
    """DPO with several β."""
    beta = torch.tensor(betas)[:, None]
    return lambda p, r, t: -F.logsigmoid(beta * (p[0] - p[1] - r[0] + r[1]))


def orpo(lambdas: Sequence[float]) -> Loss:
    """ORPO with several λ."""
    lam = torch.tensor(lambdas)[:, None]
    return lambda p, r, t: -p[0] - lam * F.logsigmoid(log_odds(p[0]) - log_odds(p[1]))


# --- the search ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What a search has found."""

    vector: np.ndarray
    history: list[float] = field(default_factory=list)
    """Mean regret of all candidates per generation."""
    chosen: dict[str, float] = field(default_factory=dict)
    """Mean regret on the tasks for choosing, per generation at which it was looked at."""


@dataclass(frozen=True)
class Bench:
    """The bandit with what was chosen on it."""

    sizes: Sizes

    def regrets(self, objective: Loss, size: int, seeds: Sequence[int], flips: float = FLIPS) -> np.ndarray:
        """``[tasks, P]``."""
        return np.stack([regret(objective, size, task(s, flips), self.sizes.steps) for s in seeds])

    @cached_property
    def beta(self) -> float:
        """DPO's best."""
        return BETAS[int(self.regrets(dpo(BETAS), len(BETAS), self.sizes.choose).mean(0).argmin())]

    @cached_property
    def lam(self) -> float:
        """ORPO's best."""
        return LAMBDAS[int(self.regrets(orpo(LAMBDAS), len(LAMBDAS), self.sizes.choose).mean(0).argmin())]

    def searched(self, vectors: np.ndarray, moving: bool) -> Loss:
        """The losses of vectors ``[P, n]``."""
        raw, slope, lam = unpacked(vectors, moving, self.beta)
        phi, psi = (Curve(OF_U, U_TERMS, r, s) for r, s in zip(raw[:2], (slope, 2.0), strict=True))
        g = Curve(OF_Z, Z_TERMS, raw[2], 0.5)
        return lambda p, r, t: loss(
            phi, psi, g, lam_s=F.softplus(lam[:, :1] + t * lam[:, 1:]), lam_p=1.0, policy=p, imitated=p[0], frozen=r, t=t
        )[0]

    def search(self, moving: bool) -> Found:
        """Evolution of the losses, from DPO."""
        s = self.sizes
        size = (2 * len(U_TERMS) + len(Z_TERMS) + 1) * (1 + moving) + 1
        evolution = Evolution(np.zeros(size), Settings(sigma=0.1, pairs=s.pairs, lr=0.03, shaping="rank"))
        history, means = [], {}
        while evolution.iteration < s.generations:
            seeds = [TRAIN + 2 * evolution.iteration + i for i in range(2)]
            asked = evolution.ask().reshape(2 * s.pairs, size)
            values = self.regrets(self.searched(asked, moving), len(asked), seeds).mean(0)
            history.append(float(values.mean()))
            evolution.tell(values.reshape(s.pairs, 2))
            if evolution.iteration % 10 == 0 or evolution.iteration == s.generations:
                means[str(evolution.iteration)] = evolution.mean.copy()
        seen = self.regrets(self.searched(np.stack(list(means.values())), moving), len(means), s.choose).mean(0)
        return Found(list(means.values())[int(seen.argmin())], history, dict(zip(means, seen.tolist(), strict=True)))

    def coefficients(self, vector: np.ndarray, moving: bool) -> Coefficients:
        """A vector as the objective's file holds it."""
        raw, slope, lam = unpacked(vector[None], moving, self.beta)
        terms = [
            tuple(Term(basis=n, at=at, raw=tuple(pair)) for (n, at), pair in zip(names, r[0].tolist(), strict=True))
            for names, r in zip((U_TERMS, U_TERMS, Z_TERMS), raw, strict=True)
        ]
        slopes = (float(slope), 2.0, 0.5)
        phi, psi, g = (Shape(slope=s, terms=t) for s, t in zip(slopes, terms, strict=True))
        return Coefficients(reference=True, lam_s=tuple(lam[0].tolist()), lam_p=1.0, phi=phi, psi=psi, g=g)


def unpacked(vectors: np.ndarray, moving: bool, beta: float) -> tuple[list[Tensor], Tensor, Tensor]:
    """Raw weights of φ, ψ and g ``[P, n, 2]``, slope of φ ``[P, 1]``, raw λ_s ``[P, 2]``; zeros are nearly DPO with ``beta``."""
    x = torch.tensor(vectors, dtype=torch.float32)
    slope, x = 2 * beta * x[:, :1].exp(), STRIDE * x[:, 1:]
    still, change = x.chunk(2, dim=1) if moving else (x, torch.zeros_like(x))
    u, z = len(U_TERMS), len(Z_TERMS)
    log = torch.tensor([{"log": ALONE, "inverse": ABSENT}.get(name, FAINT) for name, _ in U_TERMS])
    start = torch.cat([log, log, torch.tensor([ALONE] + [FAINT] * (z - 1)), torch.tensor([ABSENT])])
    raw = torch.stack([start + still, change], dim=-1)
    return [raw[:, :u], raw[:, u : 2 * u], raw[:, 2 * u : 2 * u + z]], slope, raw[:, -1]


# --- comparison ----------------------------------------------------------------------------------------------


def compared(bench: Bench, found: dict[str, Found]) -> tuple[list[Check], dict[str, Any]]:
    """(iii)."""
    tables = {}
    for label, first, flips in (("flipped", TEST, FLIPS), ("clean", CLEAN, 0.0)):
        seeds = range(first, first + bench.sizes.tasks)
        arms = {"dpo": dpo([bench.beta]), "orpo": orpo([bench.lam])}
        arms |= {name: bench.searched(f.vector[None], name == "moving") for name, f in found.items()}
        tables[label] = {name: bench.regrets(arm, 1, seeds, flips)[:, 0] for name, arm in arms.items()}
    checks, seen = [], tables["flipped"]
    for other in ("dpo", "orpo"):
        gain = seen[other] - seen["static"]
        error, share = float(gain.std(ddof=1) / np.sqrt(len(gain))), float(gain.mean() / seen[other].mean())
        text, errors = f"new tasks, 30 % flips: found loss below {other}", float(gain.mean()) / error
        checks += [
            Check(f"{text}, in standard errors", ">= 1", errors, errors >= 1),
            Check(f"{text}, share of its regret", ">= 0.05", share, share >= 0.05),
        ]
    vectors = {name: bench.coefficients(f.vector, name == "moving") for name, f in found.items()}
    return checks, {
        "beta": bench.beta, "lambda": bench.lam,
        "regret": {label: {k: v.tolist() for k, v in t.items()} for label, t in tables.items()},
        "mean_regret": {label: {k: float(v.mean()) for k, v in t.items()} for label, t in tables.items()},
        "history": {name: f.history for name, f in found.items()}, "chosen_at": {name: f.chosen for name, f in found.items()},
        "coefficients": {name: c.model_dump(mode="json") for name, c in vectors.items()},
        "shape": shape(bench, found["static"].vector),
    }  # fmt: skip


def shape(bench: Bench, vector: np.ndarray) -> dict[str, list[float]]:
    """φ and ψ over u, and g' over z, of the found loss."""
    raw, slope, _ = unpacked(vector[None], False, bench.beta)
    u, z = torch.linspace(0.02, 0.98, 25), torch.linspace(-3, 3, 25).requires_grad_()
    phi, psi = (Curve(OF_U, U_TERMS, r, s)(u.log()[None])[0] for r, s in zip(raw[:2], (slope, 2.0), strict=True))
    (by_z,) = torch.autograd.grad(Curve(OF_Z, Z_TERMS, raw[2], 0.5)(z[None]).sum(), z)
    return {"u": u.tolist(), "phi": phi.tolist(), "psi": psi.tolist(), "z": z.tolist(), "slope_of_g": by_z.tolist()}


# --- a language model ----------------------------------------------------------------------------------------


def transfer(study: Study, found: Coefficients) -> tuple[list[Check], dict[str, Any], list[str]]:
    """(iv)."""
    path = study.folder / named(found)
    write(path, found)
    objectives: dict[str, list[Any]] = {
        "dpo": [{"dpo": {"beta": b}} for b in (0.03, 0.1, 0.3, 1.0)],
        "orpo": [{"orpo": {"lam": x}} for x in (0.3, 1.0, 3.0, 10.0)],
        "found": [{"mirror-po": {"shape": "custom", "coefficients": str(path), "beta": b}} for b in (0.1, 1.0, 10.0, 100.0)],
    }
    bench = Arms(study, {"flipped": wordpairs.pairs(size(study, 4000), flip=FLIPS)}, steps=200, tuning=100)
    arms = {name: bench.tuned(tries(o, [1e-3], data="flipped")) for name, o in objectives.items()}
    gap = (arms["found"].mean() - max(arms["dpo"].mean(), arms["orpo"].mean())) / bench.sd
    text = "language model, 30 % flips: gold reward over the better of DPO and ORPO, in sd of answers"
    check = Check(text, ">= -0.1", gap, gap >= -0.1)
    return [check], {"transfer": bench.report(**arms)}, bench.notes(**arms)


def named(found: Coefficients) -> str:
    """Name of the file of a loss, of its content: what is kept of runs with another loss is not read for it."""
    return f"found-{hashlib.sha256(found.model_dump_json().encode()).hexdigest()[:12]}.json"
