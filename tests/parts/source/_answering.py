"""What tests of sources that let the model answer share: a made-up policy, and runs of two rounds on the word model."""

import json
import math
from pathlib import Path

import numpy as np

from metier import train
from metier.core import models, part
from metier.core.data.encode import Encoder
from metier.core.data.examples import Completion, Preference, Prompted
from metier.core.sample import Answer
from metier.lab import wordpairs, words

LOG2 = math.log(2)
REWARD = {
    "lexicon": {
        "good": sorted({w for pair in words.GOOD for w in pair}),
        "bad": sorted({w for pair in words.BAD for w in pair}),
    }
}


def answer(text, ended=True):
    return Answer(np.zeros(1, np.int32), text, ended, np.zeros(1, np.float32))


class Made:
    """A policy that says what ``says(prompt, number, call)`` returns: texts, or ``(text, ended)``."""

    reference = None

    def __init__(self, says, logps=None, initial=None, folder=Path()):
        self.encoder = Encoder(models.tokenizer_of("lab/words-sft"), max_length=64, truncate="error", on_empty="error")
        self.says, self.calls, self.folder = says, [], folder
        self.logps, self.initial_logps = (_scored(f) for f in (logps, initial))

    def sample(self, prompts, number, *, max_new_tokens, seed, temperature=1.0, top_p=1.0):
        self.calls.append({"prompts": prompts, "number": number, "temperature": temperature, "top_p": top_p, "seed": seed})
        rows = [self.says(p, number, len(self.calls) - 1) for p in prompts]
        return [[answer(*(a if isinstance(a, tuple) else (a,))) for a in row] for row in rows]


def _scored(f):
    return lambda prompts, answers: [np.array([f(p, a) for a in own]) for p, own in zip(prompts, answers, strict=True)]


def build(name, **options):
    return part.build("source", {name: options}).obj


def rounds(source, inputs, policy, number=1, seed=0):
    """What the first rounds give, each with its own random numbers."""
    return [source.round(inputs, policy=policy, round=i, rng=np.random.default_rng([seed, i])) for i in range(number)]


def prompted(number):
    return {"train": [Prompted(f"p{i}", id=f"rows:{i}", meta={"row": i}) for i in range(number)]}


def completed(number):
    return {"train": [Completion(f"p{i}", f"data {i}", id=f"rows:{i}") for i in range(number)]}


def paired(number, name="train"):
    return {name: [Preference(f"q{i}", f"good {i}", f"bad {i}", id=f"pairs:{i}") for i in range(number)]}


# --- runs -----------------------------------------------------------------------------------------------------------


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def prompts_file(tmp_path, number=16, **options):
    return write(tmp_path / "prompts.jsonl", [{"prompt": p} for p in words.prompts(number, 1, **options)])


def pairs_file(tmp_path, number=16):
    return write(tmp_path / "pairs.jsonl", wordpairs.pairs(number, 1))


def completions_file(tmp_path, number=16):
    return write(tmp_path / "completions.jsonl", wordpairs.mixture(number, 1))


def word_run(data, source, objective, *, hooks=(), steps, batch=8, **more):
    return {
        "model": "lab/words-sft", "data": {"train": data, "source": source, "max_length": 64}, "objective": objective,
        "optimizer": {"adamw": {"lr": 1e-3}}, "schedule": "constant", "hooks": list(hooks),
        "train": {"steps": steps, "batch": batch}, **more,
    }  # fmt: skip


FOLLOWED = {"tr-dpo": {"share": 1.0, "every": "round"}}


def losses(result):
    return [e["loss"] for e in result.events if e["event"] == "step"]


def rows_of(folder, round):
    path = Path(folder) / "rounds" / f"round-{round:04d}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_resumes(run, tmp_path, stop):
    """The whole run, and the same interrupted after step ``stop`` in its second round: equal losses and equal rounds."""
    whole = train(run, out=tmp_path / "whole", quiet=True)
    train({**run, "train": {**run["train"], "steps": stop}}, out=tmp_path / "parts", quiet=True)
    second = rows_of(tmp_path / "parts", 2)
    rest = train(run, out=tmp_path / "parts", quiet=True)
    assert 0 < losses_of_round(whole, tmp_path / "whole") < stop < len(losses(whole)), "the stop is not inside round 2"
    assert losses(rest)[-1] == losses(whole)[-1]
    assert rows_of(tmp_path / "parts", 2) == second == rows_of(tmp_path / "whole", 2)
    return whole


def losses_of_round(result, folder):
    """Number of steps that the first round lasts."""
    batch = json.loads((Path(folder) / "run.json").read_text())["run"]["train"]["batch"]
    return len(rows_of(folder, 1)) // batch
