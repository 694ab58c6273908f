"""Oracle of hook/neftune: the noise it adds, seen from outside the embedding layer.

Bugs it is meant to catch: L taken as the padded or the packed length, the square root on the wrong factor,
noise in [0, 1], noise in evaluation, one noise for the whole run.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from metier.core import aux, models, part
from metier.testing import check_part
from metier.testing._tiny import layout, tiny, weights

LONG = layout([[1, 2, 3, 4, 5, 6, 7, 8] * 4, [5, 6, 7, 8] * 2])
PACKED = replace(
    layout([[1] * 32]),
    group=torch.tensor([[1] * 8 + [2] * 20 + [0] * 4]),
    branch=torch.tensor([[0] * 8 + [0] * 4 + [1] * 6 + [2] * 10 + [0] * 4]),
)


def started(alpha=5.0):
    hook = part.build("hook", {"neftune": {"alpha": alpha}}).obj
    run = tiny(hook)
    run.context.model.train()
    run.dispatch("on_start", run.context)
    return hook, run


def noise(run, batch):
    """What is added to the embeddings of a layout, ``[R, T, d]``."""
    table = models.embeddings(run.context.model)
    run.context.layouts = [batch]
    with aux.collect(batch):
        return (table(batch.input_ids) - table.weight[batch.input_ids]).detach().double().numpy()


def test_contract():
    check_part("hook/neftune")


def test_bound_and_spread_by_the_real_length():
    _, run = started(alpha=3.0)
    got, d = noise(run, LONG), models.embeddings(run.context.model).weight.shape[1]
    for row, length in ((0, 32), (1, 8)):
        bound = 3.0 / np.sqrt(length * d)
        real = got[row, :length]
        assert abs(real).max() <= bound * (1 + 1e-4)
        assert abs(real).max() > 0.97 * bound
        assert abs(real.mean()) < 4 * bound / np.sqrt(3 * real.size)
        assert real.std() == pytest.approx(bound / np.sqrt(3), rel=0.1)
    assert not got[1, 8:].any()


def test_packed_rows_and_shared_prompts_use_each_sequences_length():
    _, run = started(alpha=1.0)
    d = models.embeddings(run.context.model).weight.shape[1]
    got = noise(run, PACKED)[0]
    for places, length in ((slice(0, 8), 8), (slice(8, 12), 14), (slice(12, 18), 10), (slice(18, 28), 14)):
        assert abs(got[places]).max() == pytest.approx(1 / np.sqrt(length * d), rel=0.06)
    assert not got[28:].any()


def test_only_in_training_mode():
    _, run = started()
    assert noise(run, LONG).any()
    run.context.model.eval()
    assert not noise(run, LONG).any()
    run.context.model.train()
    run.dispatch("on_end", run.context)
    assert not noise(run, LONG).any()
    assert not models.embeddings(run.context.model)._forward_hooks


def test_fresh_each_step_but_a_function_of_the_step():
    _, run = started()
    first = noise(run, LONG)
    assert (noise(run, LONG) == first).all()
    run.context.clock = replace(run.context.clock, step=1)
    assert not (noise(run, LONG) == first).all()


def test_micro_batches_differ():
    _, run = started()
    other = replace(LONG)
    run.context.layouts = [other, LONG]
    first, table = noise(run, LONG), models.embeddings(run.context.model)
    run.context.layouts = [other, LONG]
    with aux.collect(LONG):
        second = (table(LONG.input_ids) - table.weight[LONG.input_ids]).detach().double().numpy()
    assert not (first == second).all()


def test_alpha_zero_changes_nothing():
    _, with_hook = started(alpha=0.0)
    without = tiny()
    for run in (with_hook, without):
        run.step()
    a, b = weights(with_hook.context.model), weights(without.context.model)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_it_does_not_touch_the_other_random_streams():
    _, run = started()
    before = torch.get_rng_state()
    noise(run, LONG)
    assert torch.equal(torch.get_rng_state(), before)
