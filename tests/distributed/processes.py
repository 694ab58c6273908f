"""Two gloo processes for a test: joined over a file and the loopback interface, so that no port can be taken in between.

gloo has been seen to abort a process about once in a hundred launches on a busy machine, while connecting or at the end
(pytorch/gloo#514). Such a launch is tried once more; an exception of the test's own code is not.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import timedelta

import torch

ABORTED = signal.SIGABRT.name


def two(folder, function, *args):
    """What ``function(rank, *args)`` gives in each of two processes of one group, as JSON gives it back."""
    try:
        _launch(folder / "group", function, args)
    except torch.multiprocessing.ProcessExitedException as e:
        if e.signal_name != ABORTED:
            raise
        shutil.rmtree(folder / "group")
        _launch(folder / "group", function, args)
    return [json.loads((folder / "group" / f"{rank}.json").read_text()) for rank in (0, 1)]


def launched(command, world):
    """The finished ``python command`` in ``world`` processes of ``torchrun``."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    whole = [sys.executable, *launcher, *map(str, command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(whole, capture_output=True, text=True, env=environment, check=False)
    if done.returncode and ABORTED in done.stderr:
        done = subprocess.run(whole, capture_output=True, text=True, env=environment, check=False)
    return done


def _launch(folder, function, args):
    folder.mkdir()
    torch.multiprocessing.spawn(_process, (function, folder, args), nprocs=2)


def _process(rank, function, folder, args):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(minutes=5))
    result = function(rank, *args)
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()  # neither closes its connections while the other still uses them
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may still hold tensors, which must not be freed while the interpreter is taken down
