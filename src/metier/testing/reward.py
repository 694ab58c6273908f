"""What every reward must do: one finite number per completion, the same each time, whatever the text."""

import torch
from torch import Tensor

from metier.core.errors import UsageError
from metier.testing._sample import sample

PROMPTS = ["What is 2 + 3?", "Say something kind."]
ANSWERS = ["2 + 3 = 5 #### 5", "6"]
COMPLETIONS = [["It is 5.", "", "I do not know"], ["You are 6 of 6", "é́🙂 ，。\x00\u202e", "nine " * 3000]]


def check(id: str) -> list[str]:
    """Run the suite on the reward ``id``. Returns the names of the checks; raises ``AssertionError``."""
    reward = sample(id).obj
    found: Tensor = reward(PROMPTS, COMPLETIONS, ANSWERS)
    assert found.shape == (2, 3), f"{id}: rewards of 2 prompts with 3 completions have shape {tuple(found.shape)}"
    assert found.is_floating_point(), f"{id}: rewards are {found.dtype}"
    assert torch.isfinite(found).all(), f"{id}: rewards are not finite: {found.tolist()}"
    assert not found.requires_grad, f"{id}: rewards carry a gradient"
    assert torch.equal(reward(PROMPTS, COMPLETIONS, ANSWERS), found), f"{id}: a second call differs"
    swapped = reward(PROMPTS[::-1], [c[::-1] for c in COMPLETIONS[::-1]], ANSWERS[::-1])
    assert torch.allclose(swapped, found.flip(0, 1)), f"{id}: a reward depends on the other prompts or on the order"
    alone = reward(PROMPTS[:1], COMPLETIONS[:1], ANSWERS[:1])
    assert torch.allclose(alone, found[:1]), f"{id}: a reward depends on the other prompts or on the order"
    assert reward(PROMPTS[:1], [["5"]], ANSWERS[:1]).shape == (1, 1), f"{id}: one prompt, one completion"
    assert reward([], [], []).shape[0] == 0, f"{id}: no prompt"
    try:
        without = reward(PROMPTS, COMPLETIONS, None)
        assert torch.isfinite(without).all(), f"{id}: rewards without answers are not finite"
    except UsageError:
        pass
    return ["shape", "finite", "repeatable", "each on its own", "small batches", "without answers"]
