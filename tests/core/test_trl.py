"""An optimizer of ours inside TRL's trainer: two steps, a scheduler, and a state that saves and loads."""

import pytest
import torch

trl = pytest.importorskip("trl")


@pytest.fixture
def trainer(tmp_path):
    import datasets
    import transformers

    from metier.lab.tokenizer import VOCABULARY, lab_tokenizer

    tokenizer = lab_tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    rows = datasets.Dataset.from_list([{"text": f"{i} is a number and so is {i + 1}"} for i in range(8)])

    def make(optimizers):
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False,
            save_strategy="steps", save_steps=1, logging_steps=1, max_length=32, disable_tqdm=True, dataset_num_proc=None,
            gradient_checkpointing=False,
        )  # fmt: skip
        return trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, optimizers=optimizers)

    return model, make


def test_two_steps_of_sft(trainer, tmp_path):
    import metier
    from metier.core.schedule import torch_scheduler

    model, make = trainer
    optimizer = metier.optimizers.Lion(model, lr=1e-3, weight_decay=0.0)
    scheduler = torch_scheduler(optimizer, metier.schedules.linear(final=0.0), steps=2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    result = make((optimizer, scheduler)).train()
    assert result.global_step == 2
    assert torch.isfinite(torch.tensor(result.training_loss))
    # Lion moves every entry that has a gradient by the learning rate: 1e-3, then half of it.
    moved = (model.model.norm.weight - before["model.norm.weight"]).abs()
    sizes = torch.tensor([0.5e-3, 1.5e-3])
    assert ((moved.unsqueeze(1) - sizes).abs().min(1).values < 1e-6).all()
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    fresh = metier.optimizers.Lion(model, lr=1e-3, weight_decay=0.0)
    fresh.load_state_dict(saved)
    ours = {n: s for n, s in optimizer.full_state_dict().items()}
    assert all(torch.equal(fresh.full_state_dict()[n]["m"], s["m"]) for n, s in ours.items())
