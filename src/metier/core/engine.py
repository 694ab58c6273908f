"""A thin layer on ``torch.distributed``: device, precision, DDP or FSDP2, reductions, output of one rank.

The same code runs as one process and under ``torchrun`` (or any launcher that sets ``RANK`` and ``WORLD_SIZE``).
"""

import contextlib
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metier.core.errors import MetierError, UsageError

HEADER = 64
"""Numbers that describe what a process gathers: a hash of the types, and all sizes."""


@dataclass(frozen=True)
class Engine:
    """One process of a run."""

    device: torch.device
    precision: str
    strategy: str
    rank: int = 0
    world: int = 1
    roots: list[nn.Module] = field(default_factory=list, compare=False, repr=False)
    """Modules whose weights are sharded."""

    @property
    def main(self) -> bool:
        """Whether this process writes files and output."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a part of the weights."""
        return self.world > 1 and self.strategy == "fsdp"

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
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            for block in blocks:
                fully_shard(block)
            fully_shard(module)
            # FSDP takes the first module that runs for the root: what runs a block alone has to begin with this
            module.begin = lambda: None  # type: ignore[assignment]
            register_fsdp_forward_method(module, "begin")
            self.roots.append(module)
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

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """All weights in every process, so that any part of the model can be used, by each process on its own.

        Collective at beginning and end, not in between. Without gradient; nothing to do unless weights are sharded.
        """
        if not self.roots:
            yield
            return
        from torch.distributed.fsdp import FSDPModule

        found = [m for root in self.roots for m in root.modules() if isinstance(m, FSDPModule)]
        with torch.no_grad():
            for root in self.roots:
                root.begin()  # type: ignore[operator]
        blocks = [m for m in found if m not in self.roots]
        for m in found:
            m.unshard()
        for m in blocks:
            m.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for m in blocks:
                m.set_reshard_after_forward(True, recurse=False)
            for m in found:
                m.reshard()

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

    def gather(self, tensors: list[Tensor]) -> list[list[Tensor]]:
        """Tensors of every process, in order of rank, on the device of this one's and bit for bit.

        Types and numbers of dimensions must agree, sizes need not: these are sent first, then all tensors as one row of bytes,
        padded to the longest. Raises ``MetierError`` in every process when they do not agree.
        """
        if self.world == 1:
            return [tensors]
        heads = [h.tolist() for h in self._everywhere(_header(tensors))]
        if any(h[0] != heads[0][0] for h in heads):
            raise MetierError("the processes have scores of different kinds in this step: some rows lack what others have")
        shapes = [_shapes(h, tensors) for h in heads]
        flat = [t.detach().contiguous().flatten().view(torch.uint8) for t in tensors]
        longest = max(_size(s, tensors) for s in shapes)
        row = torch.cat([*flat, flat[0].new_zeros(longest - sum(map(len, flat)))])
        return [_tensors(r.to(row.device), s, tensors) for r, s in zip(self._everywhere(row), shapes, strict=True)]

    def _everywhere(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of every process; of one size."""
        sent = tensor.to(self._comm_device())
        found = [torch.empty_like(sent) for _ in range(self.world)]
        dist.all_gather(found, sent)
        return found

    def gather_objects(self, found: Any) -> list[Any]:
        """An object of every process, in order of rank: for what is rare or small."""
        if self.world == 1:
            return [found]
        everywhere: list[Any] = [None] * self.world
        dist.all_gather_object(everywhere, found)
        return everywhere

    def from_main(self, found: Any = None) -> Any:
        """The object that the first process gives, in every process."""
        if self.world == 1:
            return found
        box = [found if self.main else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def by_main(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives in the first process, in every process; an exception there is one in all."""
        found, problem = None, None
        if self.main:
            try:
                found = work()
            except Exception as e:
                problem = e
        found, said = self.from_main((found, problem and _said(problem)))
        if problem is not None:
            raise problem
        if said is not None:
            raise MetierError(f"the first process failed: {said}")
        return found

    def shared(self, costs: Sequence[float], work: Callable[[list[int]], Sequence[Any]]) -> list[Any]:
        """``work`` done for the items 0, 1, …, dealt to the processes by their ``costs``; the results of all, in order, in each.

        ``work(share)`` gives one result for each of its items and must not depend on which others are in the share. Collective:
        all processes give the same costs. When ``work`` raises in one process, every process raises.
        """
        if self.world == 1:
            return list(work(list(range(len(costs)))))
        order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
        shares = [order[r :: self.world] for r in range(self.world)]
        mine, problem = [], None
        try:
            mine = list(work(shares[self.rank])) if shares[self.rank] else []
        except Exception as e:
            problem = e
        everywhere = self.gather_objects((mine, problem and _said(problem)))
        if problem is not None:
            raise problem
        if failed := [(r, said) for r, (_, said) in enumerate(everywhere) if said]:
            raise MetierError(f"process {failed[0][0]} failed: {failed[0][1]}")
        found = {i: x for share, (xs, _) in zip(shares, everywhere, strict=True) for i, x in zip(share, xs, strict=True)}
        return [found[i] for i in range(len(costs))]

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


def _said(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}"


def _header(tensors: Sequence[Tensor]) -> Tensor:
    kinds = zlib.crc32(str([(t.dtype, t.ndim) for t in tensors]).encode())
    sizes = [n for t in tensors for n in t.shape]
    return torch.tensor([kinds, *sizes, *[0] * (HEADER - 1 - len(sizes))])


def _shapes(header: list[int], like: Sequence[Tensor]) -> list[list[int]]:
    at = iter(header[1:])
    return [[next(at) for _ in range(t.ndim)] for t in like]


def _size(shapes: list[list[int]], like: Sequence[Tensor]) -> int:
    """Bytes of tensors of these shapes."""
    return sum(math.prod(s) * t.element_size() for s, t in zip(shapes, like, strict=True))


def _tensors(row: Tensor, shapes: list[list[int]], like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of joining tensors as bytes; each is copied out, since a view would have to be aligned."""
    pieces = row[: _size(shapes, like)].split([_size([s], [t]) for s, t in zip(shapes, like, strict=True)])
    return [p.clone().view(t.dtype).reshape(s) for p, s, t in zip(pieces, shapes, like, strict=True)]


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
