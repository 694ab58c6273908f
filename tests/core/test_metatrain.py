"""Learning an optimizer's file: what the inner runs see, resuming, and one search with real runs."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from metier.core import api, part
from metier.core.errors import UsageError
from metier.core.evolution import Settings, perturbations
from metier.core.guards import NonFiniteError
from metier.core.metatrain import metatrain, search

START = {"b": torch.ones(2, 3), "a": torch.zeros(2)}
SETTINGS = Settings(sigma=0.1, pairs=3, lr=0.05, seed=1)


def distance(file, seed):
    return float(sum((t - 2).square().sum() for t in load_file(file).values()))


def test_candidates_and_seeds_of_pairs(tmp_path):
    seen = []

    def evaluate(file, seed):
        seen.append((load_file(file), seed))
        return 1.0

    search(START, {"x": "y"}, evaluate, out=tmp_path / "f.safetensors", iterations=2, settings=SETTINGS)
    assert len(seen) == 12
    seeds = [seed for _, seed in seen]
    assert seeds[0::2] == seeds[1::2]
    assert len(set(seeds)) == 6
    noise = perturbations(8, 3, seed=1, iteration=0)
    for i, side in ((0, 1), (1, -1)):
        moved = torch.tensor(0.1 * side * noise[0])
        torch.testing.assert_close(seen[i][0]["a"], moved[:2].float())
        torch.testing.assert_close(seen[i][0]["b"], (1 + moved[2:]).reshape(2, 3).float())


def test_it_descends_and_resumes_to_the_bit(tmp_path):
    def go(name, iterations):
        return search(START, {"x": "y"}, distance, out=tmp_path / name, iterations=iterations, settings=SETTINGS)

    whole = go("whole.safetensors", 12)
    go("parts.safetensors", 5)
    rest = go("parts.safetensors", 12)
    for key, value in load_file(whole.file).items():
        assert torch.equal(value, load_file(rest.file)[key])
    assert rest.history == whole.history
    assert rest.runs == 72
    assert distance(whole.file, 0) < 0.8 * sum(float((t - 2).square().sum()) for t in START.values())
    assert go("whole.safetensors", 12).history == whole.history


def test_a_search_that_was_stopped_within_an_iteration_repeats_it(tmp_path):
    calls = []

    def stops(file, seed):
        calls.append(seed)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return distance(file, seed)

    out = tmp_path / "f.safetensors"
    with pytest.raises(KeyboardInterrupt):
        search(START, {}, stops, out=out, iterations=3, settings=SETTINGS)
    found = search(START, {}, distance, out=out, iterations=3, settings=SETTINGS)
    plain = search(START, {}, distance, out=tmp_path / "g.safetensors", iterations=3, settings=SETTINGS)
    assert found.history == plain.history
    assert torch.equal(load_file(out)["b"], load_file(plain.file)["b"])


def test_candidates_that_fail_are_told_and_survived(tmp_path):
    told = []
    found = search(
        START, {}, lambda f, s: float("nan"), out=tmp_path / "f.safetensors", iterations=2, settings=SETTINGS, tell=told.append
    )
    assert [t["not_finite"] for t in told] == [6, 6]
    assert torch.equal(load_file(found.file)["b"], START["b"])
    assert b"NaN" not in (tmp_path / "f.search.safetensors").read_bytes()
    again = search(START, {}, distance, out=tmp_path / "f.safetensors", iterations=3, settings=SETTINGS)
    assert np.isnan(again.history[0]["mean"])
    assert again.history[2]["not_finite"] == 0


def test_files_of_another_search_are_left_alone(tmp_path):
    out = tmp_path / "f.safetensors"
    search(START, {}, distance, out=out, iterations=1, settings=SETTINGS)
    before = out.read_bytes()
    with pytest.raises(UsageError, match="holds another search"):
        search(START, {}, distance, out=out, iterations=2, settings=Settings(sigma=0.2, pairs=3, seed=1))
    with pytest.raises(UsageError, match="holds another search"):
        search(START, {}, distance, out=out, iterations=2, settings=SETTINGS, identity={"run": 1})
    (tmp_path / "f.search.safetensors").unlink()
    with pytest.raises(UsageError, match="exists"):
        search(START, {}, distance, out=out, iterations=2, settings=SETTINGS)
    assert out.read_bytes() == before


# --- with runs --------------------------------------------------------------------------------------------


def spec(tmp_path, **changes):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(f'{{"text": "document {i} says hello to number {i * i}"}}' for i in range(40)))
    return {
        "model": "lab/llama-50k",
        "data": {"train": str(data), "eval_fraction": 0.2, "max_length": 32},
        "optimizer": {"l3rs": {"lr": 0.3, "hidden": 4, "groups": {"*norm*": {"lr_scale": 0.5}}}},
        "schedule": "constant",
        "train": {"steps": 3, "batch": 4},
        **changes,
    }


def test_with_real_runs(tmp_path):
    out = tmp_path / "learned" / "controller.safetensors"
    settings = Settings(sigma=0.3, pairs=2, lr=0.1)
    found = metatrain(spec(tmp_path), out=out, iterations=2, settings=settings)
    assert found.runs == 8
    assert all(0 < h["lowest"] < h["highest"] < 12 for h in found.history)
    rule = part.build("optimizer", {"l3rs": {"controller": str(out)}}).obj
    names = rule._controller.names
    assert "model.layers.0.mlp.up_proj.weight" in names
    run = spec(tmp_path, optimizer={"l3rs": {"lr": 0.3, "controller": str(out)}})
    done = api.train(run, out=tmp_path / "run", quiet=True)
    plain = api.train(spec(tmp_path), out=tmp_path / "plain", quiet=True)
    assert done.metrics["eval_loss"] != plain.metrics["eval_loss"]
    # From the learned file on: another search, which starts where this one has ended.
    more = metatrain(run, out=tmp_path / "more.safetensors", iterations=0, settings=settings)
    for key, value in load_file(more.file).items():
        assert torch.equal(value, load_file(out)[key]), key


def test_members_of_a_pair_are_the_same_run_but_for_the_file(tmp_path, monkeypatch):
    seen = []

    def recorded(run, **options):
        seen.append(run)
        raise NonFiniteError({"event": "guard", "step": 1, "action": "stop", "text": "x"})

    monkeypatch.setattr(api, "train", recorded)
    found = metatrain(spec(tmp_path), out=tmp_path / "c.safetensors", iterations=1, settings=Settings(pairs=2))
    assert found.history[0]["not_finite"] == 4
    files = [run["optimizer"]["l3rs"].pop("controller") for run in seen]
    assert len(set(files)) == 4
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert seen[0]["train"]["seed"] != seen[2]["train"]["seed"]
    assert seen[0]["optimizer"] == spec(tmp_path)["optimizer"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamw"}, "optimizer/adamw has no file to learn"),
        ({"optimizer": {"l3rs": {"controller": "nowhere"}}}, "there is no controller file nowhere"),
        ({"optimizer": {"l3rs": {"hiden": 3}}}, "Did you mean 'hidden'"),
    ],
)
def test_requests_that_are_refused(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        metatrain(spec(tmp_path, **changes), out=tmp_path / "c.safetensors", iterations=1, settings=SETTINGS)
    assert not (tmp_path / "c.safetensors").exists()


def test_held_out_data_are_needed(tmp_path):
    run = spec(tmp_path)
    run["data"]["eval_fraction"] = 0.0
    with pytest.raises(UsageError, match="held-out"):
        metatrain(run, out=tmp_path / "c.safetensors", iterations=1, settings=SETTINGS)


def test_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        metatrain(spec(tmp_path), out=tmp_path / "c.safetensors", iterations=1, settings=SETTINGS)
