"""A thin layer on ``torch.distributed``: device, precision, DDP or FSDP2, reductions, output of one rank.

The same code runs as one process and under ``torchrun`` (or any launcher that sets ``RANK`` and ``WORLD_SIZE``).
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metier.core.errors import UsageError


@dataclass(frozen=True)
class Engine:
    """One process of a run."""

    device: torch.device
    precision: str
    strategy: str
    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and output."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision of forward passes."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def wrap(self, module: nn.Module, blocks: Iterable[nn.Module] = ()) -> nn.Module:
        """``module`` ready for this world: itself, DDP, or sharded in place block by block (FSDP2)."""
        if self.world == 1:
            return module
        if self.strategy == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for block in blocks:
                fully_shard(block)
            fully_shard(module)
            return module
        from torch.nn.parallel import DistributedDataParallel

        ids = [self.device.index] if self.device.type == "cuda" else None
        import inspect

        # Buffers are the same everywhere; the argument that says so has a new name since torch 2.13.
        known = inspect.signature(DistributedDataParallel).parameters
        more: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
        return DistributedDataParallel(module, device_ids=ids, **more)

    @contextlib.contextmanager
    def accumulating(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Gradients are exchanged only for the last micro-batch of a step."""
        if self.world == 1 or last:
            if hasattr(module, "set_requires_gradient_sync"):
                module.set_requires_gradient_sync(True)  # type: ignore[operator]
            yield
        elif hasattr(module, "set_requires_gradient_sync"):
            module.set_requires_gradient_sync(False)  # type: ignore[operator]
            yield
        else:
            with module.no_sync():  # type: ignore[operator]
                yield

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all processes, in float64."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self._comm_device())
        dist.all_reduce(total)
        return total.tolist()

    def total(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over all processes, in its own type."""
        if self.world == 1:
            return tensor
        moved = tensor.to(self._comm_device(), copy=True)
        dist.all_reduce(moved)
        return moved.to(tensor.device)

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their means over all processes."""
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= self.world

    def largest(self, value: Tensor) -> Tensor:
        """The largest of the processes' values; infinite when one of them is not a number."""
        if self.world > 1:
            value = value.nan_to_num(nan=float("inf"))
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return value

    def gather(self, found: Any) -> list[Any]:
        """An object of every process, in order of rank; tensors in it should be on the CPU."""
        if self.world == 1:
            return [found]
        everywhere: list[Any] = [None] * self.world
        dist.all_gather_object(everywhere, found)
        return everywhere

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return flag if self.world == 1 else self.sum([float(flag)])[0] > 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()

    def grad_norm(self, params: Iterable[Tensor]) -> Tensor:
        """Global 2-norm of the gradients; sharded gradients are reduced over the processes."""
        grads = [p.grad for p in params if p.grad is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
        if not norms:
            return torch.zeros((), device=self.device)
        norms = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]  # type: ignore[operator]
        return torch.linalg.vector_norm(torch.stack([n.to(self.device) for n in norms]))

    def _comm_device(self) -> torch.device:
        return self.device if dist.get_backend() == "nccl" else torch.device("cpu")

    def close(self) -> None:
        """Leave the process group if this engine belongs to one."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def start(device: str = "auto", precision: str = "fp32", strategy: str = "auto") -> Engine:
    """The engine of this process; joins the process group when a launcher set one up."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _device(device, local)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", rank=rank, world_size=world)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return Engine(chosen, precision, "ddp" if strategy == "auto" else strategy, rank, world)


def _device(name: str, local: int) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        wanted = torch.device(name)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as e:
        raise UsageError(f"device {name!r} cannot be used here: {str(e).splitlines()[0]}") from None
    return wanted


def peak_memory(device: torch.device) -> int:
    """Peak bytes since :func:`reset_peak_memory`: allocated on a GPU, resident set of the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    except (OSError, StopIteration):
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Forget earlier peaks, where the system allows it (Linux, CUDA): runs that share a process are told apart."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
