"""What an optimizer tells its rules about a step."""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a rule may know about the step it makes. All tensors of one call share it."""

    t: int
    """1, 2, …: how often these tensors have moved, this step included."""
    lr: float
    weight_decay: float = 0.0
    peak: float = 0.0
    """The group's learning rate before the schedule's multiplier."""
    names: tuple[str, ...] = ()
    """Name of every tensor of the call, in its order."""
    loss: float | None = None
    """Mean loss of the step, when the training loop tells it."""
    progress: float | None = None
    """Fraction of the run done before the step, when the training loop tells it."""
    sampled: tuple[Tensor | None, ...] | None = None
    """Gradients of the mean loss on labels drawn from the model's own distribution, on the steps that
    :attr:`Rule.sample_every` asks for."""
    samples: int = 0
    """Number of labels drawn."""

    def only(self, rows: list[int]) -> "Step":
        """The step as the tensors ``rows`` of the call see it."""
        return replace(
            self,
            names=tuple(self.names[i] for i in rows) if self.names else (),
            sampled=None if self.sampled is None else tuple(self.sampled[i] for i in rows),
        )
