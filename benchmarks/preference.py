"""DPO of SmolLM2-135M, metier against trl's ``DPOTrainer``: pairs a second, peak memory, gradients.

The same pairs (160-token prompts, two answers of 60 tokens), 4 pairs a step, fp32. LoRA (rank 16, all linear layers) with a live
and with a cached reference, and full fine-tuning. Each side runs in a process of its own, so that its peak memory is its
own. First, the gradients of both on one batch are compared. ``--lists`` also measures what 2, 4 and 8 answers to a prompt
as long as four answers cost.

    python benchmarks/preference.py [--json] [--steps 4] [--only lora cached full] [--lists]
"""

import json
import sys
import tempfile
from pathlib import Path

import _sides
from _sides import MODEL, RANK, SKIPPED

BATCH = 4
PROMPT, ANSWER = 160, 60
WAYS = ("lora", "cached", "full")


def pairs(number: int, prompt: int = PROMPT, answers: int = 2, answer: int = ANSWER) -> list[list[str]]:
    """Prompt and answers of the stated lengths in tokens, cut from the lab's corpus."""
    from metier.core import models
    from metier.lab.corpus import documents

    tokenizer = models.tokenizer_of(MODEL)
    ids = tokenizer(" ".join(d["text"] for d in documents("lab/pydoc")[:80]), add_special_tokens=False)["input_ids"]
    at, rows = 0, []
    for _ in range(number):
        found = []
        for length in (prompt, *[answer - 2] * answers):
            found.append(tokenizer.decode(ids[at : at + length]))
            at = (at + length) % (len(ids) - 400)
        rows.append(found)
    return rows


def as_chat(row: list[str]) -> dict:
    """A row as both sides read it."""
    prompt, chosen, rejected = row
    answers = {k: [{"role": "assistant", "content": v}] for k, v in (("chosen", chosen), ("rejected", rejected))}
    return {"prompt": [{"role": "user", "content": prompt}], **answers}


def trl_trainer(rows: list[dict], steps: int, out: str, way: str):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from metier.core import models

    bundle = models.load(MODEL)
    config = DPOConfig(**_sides.settings(out, BATCH, steps, 1e-5), beta=0.1, precompute_ref_log_probs=way == "cached")
    frozen = models.load(MODEL).model if way == "full" else None  # else it looks for the model's name on the hub
    return DPOTrainer(
        model=bundle.model, ref_model=frozen, args=config, train_dataset=Dataset.from_list(rows), processing_class=bundle.tokenizer,
        peft_config=None if way == "full" else _sides.lora(),
    )  # fmt: skip


def run_trl(steps: int, way: str) -> dict:
    with tempfile.TemporaryDirectory() as out:
        trainer = trl_trainer([as_chat(r) for r in pairs(BATCH * steps)], steps, out, way)
        return summary(_sides.train(trainer))


def metier_run(path: Path, steps: int, way: str, objective: str = "dpo") -> dict:
    return {
        "model": MODEL, "data": {"train": str(path), "max_length": 2048}, "objective": objective,
        **({} if way == "full" else {"adapter": {"lora": {"rank": RANK}}}),
        "reference_scores": str(path.parent / "scores") if way == "cached" else "live",
        "optimizer": {"adamw": {"lr": 1e-5}}, "train": {"steps": steps, "batch": BATCH},
    }  # fmt: skip


def run_metier(steps: int, way: str) -> dict:
    from metier import train

    with tempfile.TemporaryDirectory() as out:
        path = Path(out) / "train.jsonl"
        path.write_text("\n".join(json.dumps(as_chat(r)) for r in pairs(BATCH * steps)))
        events = train(metier_run(path, steps, way), out=Path(out) / "run", quiet=True, keep_weights=False).events
    return summary([e["time"] for e in events if e["event"] == "step"])


def run_lists(steps: int, way: str) -> dict:
    """Seconds per prompt with ``way`` answers of which four are as long as the prompt."""
    from metier import train

    answers = int(way)
    rows = [
        {"prompt": prompt, "completions": texts, "scores": list(range(answers))}
        for prompt, *texts in pairs(BATCH * steps, prompt=4 * ANSWER, answers=answers)
    ]
    with tempfile.TemporaryDirectory() as out:
        path = Path(out) / "train.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        run = metier_run(path, steps, "lora", objective="pl-dpo")
        events = train(run, out=Path(out) / "run", quiet=True, keep_weights=False).events
    return summary([e["time"] for e in events if e["event"] == "step"])


def summary(times: list[float]) -> dict:
    """Pairs (or prompts) a second after the first steps, and the peak memory of this process."""
    return {"per_second": BATCH * (len(times) - SKIPPED) / _sides.timed(times), "peak_bytes": _sides.peak_bytes()}


def gradients(steps: int, way: str) -> dict:
    """Largest relative difference between the LoRA gradients of both sides on trl's batch of tokens.

    In training trl also teaches what the template puts after the end-of-turn token (here a newline); metier does not.
    """
    import numpy as np

    from metier.core.data.encode import Item

    with tempfile.TemporaryDirectory() as out:
        trainer = trl_trainer([as_chat(r) for r in pairs(BATCH)], 1, out, "lora")
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(BATCH)])
        start, theirs = _sides.trl_gradients(trainer, batch)
    items = []
    for i in range(BATCH):  # chosen rows stand before rejected ones
        real = [batch["attention_mask"][j].bool() for j in (i, BATCH + i)]
        ids = [batch["input_ids"][j][r].numpy().astype("int32") for j, r in zip((i, BATCH + i), real, strict=True)]
        own = [batch["completion_mask"][j][r].bool().numpy() for j, r in zip((i, BATCH + i), real, strict=True)]
        answers = tuple(x[m] for x, m in zip(ids, own, strict=True))
        items.append(
            Item(ids[0][~own[0]], np.zeros((~own[0]).sum(), bool), answers, tuple(np.ones(len(a), bool) for a in answers))
        )
    return {"difference": _sides.difference(start, theirs, items, "dpo")}


SIDES = {"trl": run_trl, "metier": run_metier, "lists": run_lists, "gradients": gradients}


def main() -> None:
    parser = _sides.parser(__doc__, 4, sorted(SIDES))
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--lists", action="store_true")
    parser.add_argument("--way", default="lora")
    given = parser.parse_args()
    if given.side:
        print(json.dumps(SIDES[given.side](given.steps, given.way)))
        return

    def side(name: str, steps: int, way: str) -> dict:
        return _sides.side(__file__, name, steps, "--way", way)

    found: dict = {"gradient_difference": side("gradients", 1, "lora")["difference"]}
    for way in given.only:
        trl, metier = (side(name, given.steps, way) for name in ("trl", "metier"))
        found[way] = {
            "trl": trl, "metier": metier, "speed": metier["per_second"] / trl["per_second"],
            "memory": metier["peak_bytes"] / trl["peak_bytes"],
        }  # fmt: skip
        print(json.dumps({way: found[way]}), file=sys.stderr)
    if given.lists:
        two, four, eight = (side("lists", given.steps, str(k))["per_second"] for k in (2, 4, 8))
        found["lists"] = {"4 of 2": two / four, "8 of 2": two / eight}
    print(json.dumps(found) if given.json else text(found))


def text(found: dict) -> str:
    """The figures for people."""
    lines = [f"gradients on one batch differ by {found['gradient_difference']:.1e} (relative)"]
    for way in (w for w in WAYS if w in found):
        f = found[way]
        lines += [
            f"{way:6} {n}: {f[n]['per_second']:.3f} pairs/s, peak {f[n]['peak_bytes'] / 1e9:.2f} GB" for n in ("trl", "metier")
        ]
        lines.append(f"{way:6} metier / trl: speed {f['speed']:.2f}, peak memory {f['memory']:.2f}")
    if "lists" in found:
        lines.append("a step with more answers to each prompt, relative to two: " + json.dumps(found["lists"]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
