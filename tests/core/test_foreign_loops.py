"""The optimizers and schedules in training loops that are not ours."""

import pytest
import torch
from torch import nn

import metier.optimizers
import metier.schedules
from metier.core.schedule import torch_scheduler


def task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(64, 6)
    return model, x, (x[:, :1] * x[:, 1:2]).tanh()


def fit(model, optimizer, x, y, steps, scheduler=None, forward=None):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss((forward or model)(x), y)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def test_a_plain_loop_with_our_schedule():
    model, x, y = task()
    optimizer = metier.optimizers.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = torch_scheduler(optimizer, metier.schedules.cosine(final=0.1), steps=100, warmup=0.1)
    losses = fit(model, optimizer, x, y, 100, scheduler)
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_torchs_schedulers():
    model, x, y = task()
    optimizer = metier.optimizers.Muon(model, lr=1e-2)
    initial = [g["lr"] for g in optimizer.param_groups]
    lambdas = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    losses = fit(model, optimizer, x, y, 9, lambdas)
    assert losses[-1] < losses[0]
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([lr / 10 for lr in initial])
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5, cycle_momentum=False)
    fit(model, optimizer, x, y, 4, cycle)


def test_a_compiled_model():
    model, x, y = task()
    optimizer = metier.optimizers.Lion(model, lr=1e-2)
    losses = fit(model, optimizer, x, y, 30, forward=torch.compile(model, backend="aot_eager"))
    assert losses[-1] < losses[0]


def test_a_gradient_scaler_leaves_out_steps_that_overflow():
    model, x, y = task()
    optimizer = metier.optimizers.Signum(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = model[0].weight.detach().clone()
    scaler.scale(nn.functional.mse_loss(model(x), y) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model[0].weight, before)
    optimizer.zero_grad()
    scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
    scaler.step(optimizer)
    assert not torch.equal(model[0].weight, before)


class Random(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        ids = torch.randint(0, 50, (8,), generator=torch.Generator().manual_seed(i % 4))
        return {"input_ids": ids, "labels": ids}


def trainer(folder, steps, cls):
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    optimizer = cls(model, lr=1e-2, weight_decay=0.1)
    scheduler = torch_scheduler(optimizer, metier.schedules.wsd(decay=0.5), steps=12, warmup=2)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=6, logging_steps=1,
        report_to=[], use_cpu=True, seed=0, disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Random(), optimizers=(optimizer, scheduler))


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_the_trainer_of_transformers(tmp_path, name):
    """Trains, saves, and resumes from its own checkpoint to the same weights."""
    cls = getattr(metier.optimizers, name)
    whole = trainer(tmp_path / "whole", 12, cls)
    whole.train()
    losses = [e["loss"] for e in whole.state.log_history if "loss" in e]
    assert losses[-1] < losses[0]
    rates = [e["learning_rate"] for e in whole.state.log_history if "learning_rate" in e]
    assert max(rates) == pytest.approx(max(g["initial_lr"] for g in whole.optimizer.param_groups[:1]))
    resumed = trainer(tmp_path / "resumed", 12, cls)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
