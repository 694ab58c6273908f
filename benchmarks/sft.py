"""Supervised fine-tuning with LoRA (rank 16, all linear layers) of SmolLM2-135M: metier against trl's ``SFTTrainer``.

The same conversations (prompts of 20–160 tokens, answers of 20–120), batch 8, fp32, loss on the answers only. Each side runs
in a process of its own, so that its peak memory is its own; sides alternate. First, the gradients of both on one
batch are compared.

    python benchmarks/sft.py [--json] [--steps 6]
"""

import json
import random
import tempfile
from pathlib import Path

import _sides
from _sides import MODEL, RANK, SKIPPED

BATCH = 8


def conversations(number: int) -> list[dict]:
    """Prompts and answers of the stated lengths, cut from the lab's corpus."""
    from metier.core import models
    from metier.lab.corpus import documents

    tokenizer = models.tokenizer_of(MODEL)
    ids = tokenizer(" ".join(d["text"] for d in documents("lab/pydoc")[:60]), add_special_tokens=False)["input_ids"]
    rng, at, rows = random.Random(0), 0, []
    for _ in range(number):
        p, a = rng.randint(20, 160), rng.randint(20, 120)
        prompt, answer = tokenizer.decode(ids[at : at + p]), tokenizer.decode(ids[at + p : at + p + a])
        at = (at + p + a) % (len(ids) - 300)
        rows.append({"prompt": [{"role": "user", "content": prompt}], "completion": [{"role": "assistant", "content": answer}]})
    return rows


def trl_trainer(rows: list[dict], steps: int, out: str):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from metier.core import models

    bundle = models.load(MODEL)
    config = SFTConfig(**_sides.settings(out, BATCH, steps, 2e-4), dataset_num_proc=None)
    data = Dataset.from_list(rows)
    return SFTTrainer(
        model=bundle.model, args=config, train_dataset=data, processing_class=bundle.tokenizer, peft_config=_sides.lora()
    )


def run_trl(steps: int) -> dict:
    with tempfile.TemporaryDirectory() as out:
        trainer = trl_trainer(conversations(BATCH * steps), steps, out)
        tokens: list[int] = []
        collate = trainer.data_collator

        def counting(features):
            batch = collate(features)
            tokens.append(int(batch["attention_mask"].sum()))
            return batch

        trainer.data_collator = counting
        return summary(_sides.train(trainer), tokens)


def run_metier(steps: int) -> dict:
    from metier import train

    with tempfile.TemporaryDirectory() as out:
        path = Path(out) / "train.jsonl"
        path.write_text("\n".join(map(json.dumps, conversations(BATCH * steps))))
        run = {
            "model": MODEL, "data": {"train": str(path)}, "adapter": {"lora": {"rank": RANK}},
            "optimizer": {"adamw": {"lr": 2e-4}}, "train": {"steps": steps, "batch": BATCH},
        }  # fmt: skip
        steps_ = [e for e in train(run, out=Path(out) / "run", quiet=True, keep_weights=False).events if e["event"] == "step"]
    totals = [e["tokens"] for e in steps_]
    return summary([e["time"] for e in steps_], [b - a for a, b in zip([0, *totals], totals, strict=False)])


def summary(times: list[float], tokens: list[int]) -> dict:
    counted = sum(tokens[SKIPPED : len(times)])
    return {"tokens_per_second": counted / _sides.timed(times), "peak_bytes": _sides.peak_bytes()}


def gradients(steps: int) -> dict:
    """Largest relative difference between the LoRA gradients of both sides on one batch."""
    from metier.core.data.encode import Item

    with tempfile.TemporaryDirectory() as out:
        trainer = trl_trainer(conversations(BATCH), 1, out)
        batch = next(iter(trainer.get_train_dataloader()))
        start, theirs = _sides.trl_gradients(trainer, batch)
    items = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        real = mask.bool()
        items.append(Item(ids[real].numpy().astype("int32"), (labels[real] != -100).numpy(), id="row"))
    return {"difference": _sides.difference(start, theirs, items, "lm")}


SIDES = {"trl": run_trl, "metier": run_metier, "gradients": gradients}


def main() -> None:
    given = _sides.parser(__doc__, 6, SIDES).parse_args()
    if given.side:
        print(json.dumps(SIDES[given.side](given.steps)))
        return
    difference = _sides.side(__file__, "gradients", 1)["difference"]
    found = {name: _sides.side(__file__, name, given.steps) for name in ("trl", "metier")}
    speed = found["metier"]["tokens_per_second"] / found["trl"]["tokens_per_second"]
    memory = found["metier"]["peak_bytes"] / found["trl"]["peak_bytes"]
    if given.json:
        print(json.dumps({**found, "speed": speed, "memory": memory, "gradient_difference": difference}))
        return
    for name, f in found.items():
        print(f"{name}: {f['tokens_per_second']:.0f} real tokens/s, peak {f['peak_bytes'] / 1e9:.2f} GB")
    print(f"metier / trl: speed {speed:.2f}, peak memory {memory:.2f}; gradient difference {difference:.1e} relative")


if __name__ == "__main__":
    main()
