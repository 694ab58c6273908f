"""What the checkpoint fault tests share: a small state of all sorts, a file layer that fails on demand."""

import errno

import torch

from metier.core import files, state

OPERATIONS = ("mkdir", "create", "write", "fsync", "fsync_folder", "replace", "unlink", "rmdir")


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(step)
    return {
        "model": {"w": torch.randn(7, 5, generator=g), "b": torch.randn(5, generator=g).bfloat16()},
        "optim": {
            "state.0.exp_avg": torch.randn(7, 5, generator=g).t(),
            "state.0.step": torch.tensor(float(step)),
        },
        "parts": {},
    }


def save(root, step: int, *, finite: bool = True):
    return state.write(root, step, tensors=tensors(step), meta={"step": step, "note": "é"}, finite=finite)


def assert_is(path, step: int) -> None:
    """The checkpoint at ``path`` is the one of ``step``, bit for bit."""
    loaded = state.read(path)
    assert loaded.step == loaded.meta["step"] == step
    expected = tensors(step)
    assert loaded.tensors.keys() == expected.keys()
    for stem, named in expected.items():
        assert loaded.tensors[stem].keys() == named.keys()
        for name, tensor in named.items():
            got = loaded.tensors[stem][name]
            assert got.dtype == tensor.dtype
            assert got.shape == tensor.shape
            assert torch.equal(got, tensor)


class Faulty:
    """Counts the file operations and fails at the ``n``-th (from 1), a write after half of it was done.

    ``after`` fails all later ones too, as a process that died would.
    """

    def __init__(self, monkeypatch, n: int | None = None, *, after: bool = False, code: int = errno.EIO) -> None:
        self.n, self.after, self.code, self.count, self.log = n, after, code, 0, []
        for name in OPERATIONS:
            monkeypatch.setattr(files, name, self.wrapped(name, getattr(files, name)))

    def wrapped(self, name, real):
        def operation(*args):
            self.count += 1
            self.log.append((name, args))
            if self.n is not None and (self.count == self.n or (self.after and self.count > self.n)):
                if name == "write" and self.count == self.n:
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                raise OSError(self.code, "injected")
            return real(*args)

        return operation
