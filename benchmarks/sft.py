"""Supervised fine-tuning with LoRA (rank 16, all linear layers) of SmolLM2-135M: metier against trl's ``SFTTrainer``.

The same conversations (prompts of 20–160 tokens, answers of 20–120), batch 8, fp32, loss on the answers only. Each side runs
in a process of its own, so that its peak memory is its own; sides alternate. First, the gradients of both on one
batch are compared.

    python benchmarks/sft.py [--json] [--steps 6]
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCH, RANK, SKIPPED = 8, 16, 1
MODEL = "smollm2-135m-instruct"


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
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from metier.core import models

    bundle = models.load(MODEL)
    config = SFTConfig(
        output_dir=out, per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=2e-4, report_to=[], save_strategy="no",
        logging_steps=1, bf16=False, gradient_checkpointing=False, use_cpu=True, max_length=None, disable_tqdm=True,
        dataset_num_proc=None, seed=0,
    )  # fmt: skip
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return SFTTrainer(
        model=bundle.model, args=config, train_dataset=Dataset.from_list(rows), processing_class=bundle.tokenizer, peft_config=lora
    )  # fmt: skip


def run_trl(steps: int) -> dict:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        times: list[float] = []

        def on_step_end(self, *args, **kwargs):
            self.times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        trainer = trl_trainer(conversations(BATCH * steps), steps, out)
        tokens: list[int] = []
        collate = trainer.data_collator

        def counting(features):
            batch = collate(features)
            tokens.append(int(batch["attention_mask"].sum()))
            return batch

        trainer.data_collator = counting
        trainer.add_callback(Clock)
        trainer.train()
    return summary(Clock.times, tokens)


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
    seconds, counted = times[-1] - times[SKIPPED - 1], sum(tokens[SKIPPED : len(times)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens_per_second": counted / seconds, "peak_bytes": peak}


def gradients() -> float:
    """Largest relative difference between the LoRA gradients of both sides on one batch."""
    import torch
    from peft import get_peft_model_state_dict

    from metier.core import part
    from metier.core.adapt import attach
    from metier.core.data.collate import collate
    from metier.core.data.encode import Item
    from metier.core.lossmodule import LossModule
    from metier.core.models import load

    with tempfile.TemporaryDirectory() as out:
        trainer = trl_trainer(conversations(BATCH), 1, out)
        batch = next(iter(trainer.get_train_dataloader()))
        torch.manual_seed(1)
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.01)
        start = {k.replace("base_model.model.", ""): v.clone() for k, v in get_peft_model_state_dict(trainer.model).items()}
        trainer.model.eval()
        trainer.compute_loss(trainer.model, batch).backward()
        theirs = {
            n.replace("base_model.model.", "").replace(".default", ""): p.grad
            for n, p in trainer.model.named_parameters()
            if p.requires_grad
        }
    bundle = load(MODEL)
    attached = attach(bundle.model, part.build("adapter", {"lora": {"rank": RANK}}))
    names = {f"{name}.{suffix}": getattr(a, own) for name, a in attached.adapters.items() for own, suffix in a.peft_names.items()}
    items = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        real = mask.bool()
        items.append(Item(ids[real].numpy().astype("int32"), (labels[real] != -100).numpy(), id="row"))
    with torch.no_grad():
        for name, p in names.items():
            p.copy_(start[name])
    total, units, _ = LossModule(attached.model, part.build("objective", "lm"))(collate(items, pad_id=0))
    (total / units).backward()
    return max(((names[n].grad - g).norm() / g.norm()).item() for n, g in theirs.items())


def side(name: str, steps: int) -> dict:
    command = [sys.executable, __file__, "--side", name, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--side", choices=["trl", "metier", "gradients"])
    given = parser.parse_args()
    if given.side:
        print(
            json.dumps(
                {"trl": run_trl, "metier": run_metier, "gradients": lambda _: {"difference": gradients()}}[given.side](
                    given.steps
                )
            )
        )
        return
    difference = side("gradients", 1)["difference"]
    found = {name: side(name, given.steps) for name in ("trl", "metier")}
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
