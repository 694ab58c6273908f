"""Oracle of hook/rrc-control: the change of a layer's outputs measured from outside, before and after.

Bugs it is meant to catch: the change over the new outputs instead of the old, the multiplier applied to the weights or
on the wrong side, padding counted, the probe replaced during the run, X of a module's output, layers that share one
multiplier, c > 1.
"""

from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from metier.core import part
from metier.core.engine import Engine
from metier.core.errors import UsageError
from metier.core.layout import Layout
from metier.parts.hook._layouts import from_tensors, of_first_process, to_tensors
from metier.testing import check_part
from metier.testing._tiny import layouts, same, tiny, weights


def started(**options):
    hook = part.build("hook", {"rrc-control": options}).obj
    run = tiny(hook)
    run.context.model.train()
    run.dispatch("on_start", run.context)
    return hook, run


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


@torch.no_grad()
def inputs(model, layout):
    """Inputs of every layer on a layout, padding left out."""
    seen = {}
    handles = [m.register_forward_pre_hook(lambda m, a, n=n: seen.update({n: a[0]})) for n, m in linears(model).items()]
    model(input_ids=layout.input_ids)
    for h in handles:
        h.remove()
    return {n: x[layout.group > 0].double() for n, x in seen.items()}


def changes(old, new, x):
    return {n: float(((new[f"{n}.weight"] - old[f"{n}.weight"]).double() @ v.T).norm() / (old[f"{n}.weight"].double() @ v.T).norm())
            for n, v in x.items()}  # fmt: skip


def test_contract():
    check_part("hook/rrc-control")


def test_no_layer_changes_by_more_than_the_target_and_the_others_move_freely():
    free = tiny()
    probe = layouts(2, seed=0)[0]
    old, x = weights(free.context.model), inputs(free.context.model, probe)
    free.step()
    wanted = changes(old, weights(free.context.model), x)
    target = sorted(wanted.values())[len(wanted) // 2]
    _, run = started(target=target)
    run.step()
    got = changes(old, weights(run.context.model), x)
    assert len(got) == 7 * run.context.model.config.num_hidden_layers
    for name in wanted:
        assert got[name] == pytest.approx(min(target, wanted[name]), rel=1e-4), name
    new, other = weights(run.context.model), weights(free.context.model)
    for name in new:
        if wanted.get(name.removesuffix(".weight"), 0) < target:
            assert torch.equal(new[name], other[name]), f"{name} was not to be controlled"
    assert run.context.metrics["rrc"] == pytest.approx(max(wanted.values()), rel=1e-4)
    assert run.context.metrics["rrc_scale"] == pytest.approx(target / max(wanted.values()), rel=1e-4)


def test_the_direction_is_the_optimizers():
    _, run = started(target=1e-4)
    free = tiny()
    old = weights(run.context.model)
    run.step()
    free.step()
    for name in linears(run.context.model):
        mine, full = (weights(r.context.model)[f"{name}.weight"] - old[f"{name}.weight"] for r in (run, free))
        assert torch.cosine_similarity(mine.flatten(), full.flatten(), dim=0) > 0.99, name


def test_the_probe_stays_that_of_the_first_step_and_its_inputs_do_not():
    _, run = started(target=1e-3)
    probe = layouts(2, seed=0)[0]
    for _ in range(3):
        old, x = weights(run.context.model), inputs(run.context.model, probe)
        run.step()
        assert max(changes(old, weights(run.context.model), x).values()) == pytest.approx(1e-3, rel=2e-3)


def test_a_loose_target_changes_nothing():
    _, run = started(target=1e6)
    free = tiny()
    for _ in range(3):
        run.step()
        free.step()
    assert same(weights(run.context.model), weights(free.context.model))
    assert run.context.metrics["rrc_scale"] == 1.0


def test_between_measurements_the_multiplier_is_kept():
    hook, run = started(target=1e-3, every=2)
    run.step()
    scales = dict(hook._scales)
    old = weights(run.context.model)
    run.step()
    assert hook._scales == scales
    assert run.context.metrics["rrc_scale"] == min(scales.values())
    name = min(scales, key=scales.get)
    moved = (weights(run.context.model)[f"{name}.weight"] - old[f"{name}.weight"]).norm()
    assert 0 < moved < 0.5 * (old[f"{name}.weight"].norm())
    run.step()
    assert hook._scales != scales


def test_until_it_ends():
    _, run = started(target=1e-6, until=0.5)
    for i in range(8):
        old = weights(run.context.model)
        run.step()
        new = weights(run.context.model)
        small = max(changes(old, new, inputs(run.context.model, layouts(2, seed=0)[0])).values()) < 1e-5
        assert small == (i < 4), i
        assert ("rrc" in run.context.metrics) == (i < 4), i


def test_few_positions_are_enough():
    hook, run = started(target=1e-3, tokens=5)
    run.dispatch("on_batch", run.context, layouts(2, seed=0))
    assert {len(x) for x in hook._inputs.values()} <= {4, 5}
    assert not run.context.model.lm_head._forward_pre_hooks


def test_padding_is_left_out():
    hook, run = started()
    batch = layouts(2, seed=0)
    run.dispatch("on_batch", run.context, batch)
    assert {len(x) for x in hook._inputs.values()} == {batch[0].real_tokens}
    assert batch[0].real_tokens < batch[0].input_ids.numel()


def test_a_layer_that_would_change_by_more_than_itself():
    hook, run = started(target=0.1)
    name, layer = next(iter(linears(run.context.model).items()))
    with torch.no_grad():
        layer.weight.mul_(1e-5)
    old, x = weights(run.context.model), inputs(run.context.model, layouts(2, seed=0)[0])
    run.step()
    assert hook._scales[name] < 0.05
    assert changes(old, weights(run.context.model), x)[name] == pytest.approx(0.1, rel=1e-3)


def test_the_probe_is_computed_in_evaluation_mode_and_training_goes_on():
    _, run = started()
    modes = []
    handle = run.context.model.model.layers[0].register_forward_hook(lambda m, a, out: modes.append(m.training))
    run.step()
    handle.remove()
    assert modes == [False, True, True]


def test_resumed_between_measurements():
    def steps(run, n):
        for _ in range(n):
            run.step()
        return weights(run.context.model)

    hook, run = started(target=1e-3, every=3)
    steps(run, 2)
    again, other = started(target=1e-3, every=3)
    again.load_state_dict(hook.state_dict())
    other.context.model.load_state_dict(weights(run.context.model))
    other.context.clock = run.context.clock
    other.dispatch("on_start", other.context)
    assert same(steps(other, 2), steps(run, 2))
    assert other.context.metrics["rrc"] == run.context.metrics["rrc"]


def test_layers_of_zeros_are_left_alone():
    hook, run = started(target=1e-6)
    name, layer = next(iter(linears(run.context.model).items()))
    with torch.no_grad():
        layer.weight.zero_()
    run.step()
    assert hook._scales[name] == 1.0


def test_what_a_skipped_step_has_seen_is_not_measured_with_later():
    hook, run = started(target=1e-3, every=2)
    run.dispatch("on_batch", run.context, layouts(2, seed=0))
    run.context.clock = replace(run.context.clock, step=1)
    run.step()
    assert hook._scales == {}
    assert run.context.metrics["rrc_scale"] == 1.0


def test_nothing_to_control_is_said():
    hook = part.build("hook", "rrc-control").obj
    run = tiny(hook)
    for name, p in run.context.model.named_parameters():
        p.requires_grad_("norm" in name)
    with pytest.raises(UsageError, match="no linear layer"):
        run.dispatch("on_start", run.context)


def test_an_optimizer_that_evaluates_the_loss_is_refused():
    _, run = started()
    run.dispatch("on_batch", run.context, layouts(2, seed=0))
    with pytest.raises(UsageError, match="evaluate the loss themselves"):
        run.dispatch("on_step", run.context)


def test_layouts_survive_being_kept():
    (layout,) = layouts(1)
    layout.extra["token_type_ids"] = torch.ones_like(layout.input_ids)
    again = from_tensors(to_tensors(layout))
    for f in fields(Layout):
        a, b = getattr(layout, f.name), getattr(again, f.name)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), f.name
        elif f.name not in ("ids", "extra"):
            assert a == b, f.name
    assert torch.equal(again.extra["token_type_ids"], layout.extra["token_type_ids"])
    assert len(again.ids) == len(layout.ids)


def test_every_process_gets_the_first_ones_probe():
    mine, theirs = (to_tensors(x) for x in layouts(2, seed=5))

    class Other(Engine):
        """The second of two processes; sums are over what the first one would send."""

        def sum(self, values):
            sent = next(SENT)
            assert len(values) == len(sent)
            return [a + b for a, b in zip(values, sent, strict=True)]

    SENT = iter([v for t in theirs.values() for v in ([float(n) for n in t.shape], t.flatten().double().tolist())])
    got = of_first_process(mine, Other(torch.device("cpu"), "fp32", "ddp", rank=1, world=2))
    assert all(torch.equal(got[n], theirs[n]) and got[n].dtype == theirs[n].dtype for n in theirs)
