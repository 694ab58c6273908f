"""Rounds of a model's answers, made by several processes: what one process makes, with whole and with sharded weights.

Bugs it is meant to catch: random numbers that depend on the process, results put together in another order, a judge asked by
every process, weights that stay gathered or are those of the step before, a reference that follows a part of the weights, a
process that waits for ever when another one fails.
"""

import json

import pytest
import torch
from processes import launched, two
from safetensors.torch import load_file

from metier.core.api import train
from metier.core.batch import Pairs
from metier.core.engine import Engine
from metier.core.errors import MetierError
from metier.core.policy import Policy

SCRIPT = """
import json, sys
from metier.core.api import train
train(json.loads(sys.argv[1]), out=sys.argv[2], quiet=True, handle_signals=False)
"""
REWARD = {"python": {"function": "metier.lab.judges:quality"}}
ANSWERS = {"answers": {"prompts": "lab/preferences-held-out", "reward": REWARD, "limit": 5, "number": 2, "max_new_tokens": 8,
                       "pairs": 5, "every": 2}}  # fmt: skip
SOURCES = {
    "online-dpo": {"reward": REWARD, "prompts": 7, "max_new_tokens": 16},
    "nash-md": {"judge": REWARD, "prompts": 5, "max_new_tokens": 16, "kappa": 0.5},
    "spa": {"prompts": 7, "max_new_tokens": 16, "temperature": 1.0},
}


def settings(source, **more):
    """Steps with an eps that keeps Adam from dividing rounding by rounding where a gradient is nearly nothing."""
    return {
        "model": "lab/words-sft", "objective": "nash-md" if source == "nash-md" else "dpo",
        "data": {"train": "lab/preferences", "format": "prompts", "limit": 28, "max_length": 64,
                 "source": {source: SOURCES[source]}},
        "optimizer": {"adamw": {"lr": 1e-3, "eps": 1e-6}}, "schedule": "constant", "train": {"steps": 4, "batch": 4, "device": "cpu"}, **more,
    }  # fmt: skip


RUNS = {
    "online": settings("online-dpo", hooks=[ANSWERS, {"tr-dpo": {"share": 0.5, "every": 2}}]),
    "mixture": settings("nash-md", adapter="lora", hooks=[ANSWERS, {"tr-dpo": {"share": 1, "every": "round"}}]),
    "scores": settings("spa", reference="lab/words-120k"),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("alone"), {}

    def get(name):
        if name not in made:
            made[name] = train(RUNS[name], out=folder / name, quiet=True, handle_signals=False)
        return made[name]

    return get


def together(folder, run, world, strategy):
    script = folder / "run.py"
    script.write_text(SCRIPT, encoding="utf-8")
    return launched([script, json.dumps({**run, "train": {**run["train"], "strategy": strategy}}), folder / "together"], world)


def steps(events):
    return [e for e in events if e["event"] == "step"]


@pytest.mark.parametrize(
    ("name", "world", "strategy"),
    [("online", 2, "ddp"), ("online", 2, "fsdp"), ("mixture", 2, "fsdp"), ("scores", 2, "fsdp"),
     pytest.param("online", 4, "ddp", marks=pytest.mark.slow), pytest.param("scores", 4, "ddp", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_run_is_that_of_one_process(tmp_path, alone, name, world, strategy):
    one = alone(name)
    done = together(tmp_path, RUNS[name], world, strategy)
    assert done.returncode == 0, done.stderr[-3000:]
    first, *others = sorted((one.folder / "rounds").iterdir())
    rounds = tmp_path / "together" / "rounds"
    assert (rounds / first.name).read_bytes() == first.read_bytes()
    for path in others:  # by now the weights differ by rounding, and with them what they say of an answer
        assert rows(rounds / path.name) == rows(path, near=True)
    assert len(others) > 0
    same_weights(one.folder, tmp_path / "together")
    lines = (tmp_path / "together" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for a, b in zip(steps(one.events), steps(map(json.loads, lines)), strict=True):
        for key in {k for k in a if k == "loss" or k.startswith("answer_")}:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key


def rows(path, near=False):
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: pytest.approx(v, abs=1e-4) if near and isinstance(v, float) else v for k, v in r.items()} for r in found]


def same_weights(one, other):
    (kind,) = {"model", "adapter"} & {p.name for p in one.iterdir()}
    (mine,), (theirs,) = ([load_file(p) for p in (folder / kind).glob("*.safetensors")] for folder in (one, other))
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(theirs[name], mine[name], rtol=0, atol=1e-5)


# --- what the processes say to each other ---------------------------------------------------------------------------


def exchanged(rank):
    """Tensors of several types and of sizes that differ between the processes."""
    engine = Engine(torch.device("cpu"), "fp32", "ddp", rank, 2)
    mine = [
        torch.arange(3 + 2 * rank, dtype=torch.float64) / 7, torch.tensor([True, False] * rank).bool(),
        torch.full((2, 1 + rank), 0.1, dtype=torch.bfloat16), torch.tensor(5 + rank),
    ]  # fmt: skip
    found = engine.gather(mine)
    same = all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found[rank], mine, strict=True))
    said = [[t.double().tolist() for t in tensors] for tensors in found]
    with pytest.raises(MetierError, match="different kinds"):
        engine.gather([torch.zeros(2)] * (1 + rank))
    return [same, said]


def test_tensors_are_gathered_as_they_are(tmp_path):
    tenth = float(torch.tensor(0.1, dtype=torch.bfloat16))
    expected = [
        [[0, 1 / 7, 2 / 7], [], [[tenth], [tenth]], 5],
        [[0, 1 / 7, 2 / 7, 3 / 7, 4 / 7], [1, 0], [[tenth, tenth], [tenth, tenth]], 6],
    ]
    assert two(tmp_path, exchanged) == [[True, expected]] * 2


def divided(rank):
    """Work of unequal costs, work that fails in one process, work that only the first one does, a round that fails."""
    engine, own = Engine(torch.device("cpu"), "fp32", "ddp", rank, 2), []
    squares = engine.shared([1, 9, 5, 5, 7], lambda share: own.extend(share) or [i * i for i in share])
    single = engine.shared([1], lambda share: [rank for _ in share])

    def failing(share):
        return [1 // (1 - rank) for _ in share]

    said = [raised(lambda: engine.shared([1, 1], failing)), raised(lambda: engine.by_main(lambda: failing([0]) and 1 / 0))]
    calls = engine.by_main(lambda: own.append("main") or "judged")
    policy = Policy(None, engine, None, None, None, Pairs)
    said.append(raised(lambda: policy.together(lambda: policy._together("missing", [1.0, 1.0]))))
    said.append(raised(lambda: policy.together(lambda: 1 / 0)))
    return [squares, single, own, calls, said, raised(lambda: policy.together(lambda: None))]


def raised(work):
    try:
        work()
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return None


def test_work_is_shared_and_failures_are_known_to_all(tmp_path):
    first, second = two(tmp_path, divided)
    assert first[:2] == second[:2] == [[0, 1, 4, 9, 16], [0]]
    assert (first[2], second[2]) == ([1, 2, 0, "main"], [4, 3])
    assert first[3] == second[3] == "judged"
    zero = "ZeroDivisionError: "
    assert [s.partition(zero)[0] for s in first[4][:2]] == ["MetierError: process 1 failed: ", ""]
    assert [s.partition(zero)[0] for s in second[4][:2]] == ["", "MetierError: the first process failed: "]
    assert first[4][2].startswith("AttributeError")
    assert second[4][2].startswith("MetierError: the first process failed: AttributeError")
    assert [s.partition(zero)[0] for s in (first[4][3], second[4][3])] == ["", "MetierError: the first process failed: "]
    assert first[5] is second[5] is None


def test_a_source_that_fails_ends_all_processes(tmp_path):
    """SPA with the model itself as its reference: all pairs tie."""
    done = together(tmp_path, {**RUNS["scores"], "reference": None}, 2, "fsdp")
    assert done.returncode != 0
    assert "all pairs tie" in done.stderr
    assert "the first process failed: UsageError" in done.stderr
