"""Runs a module on several ranks, as torchrun would, in processes forked from one that has imported the libraries.

Importing them is half of the time of a short test; so it is done once for all ranks. The environment of a rank is
torchrun's. When one rank fails, the others are ended.
"""

import importlib
import os
import runpy
import signal
import socket
import sys
import traceback

import torch

# What the scripts import. Nothing here may start threads: a fork takes only the calling one along.
_LIBRARIES = [
    "accelerate", "datasets", "peft", "transformers.trainer", "transformers.models.auto.modeling_auto",
    "transformers.models.llava.modeling_llava", "transformers.models.llama.modeling_llama",
    "transformers.models.clip.modeling_clip", "hf_dflop.integrations.callback", "hf_dflop.data.packing_check",
    "hf_dflop.profile.dataset", "hf_dflop.balance.search",
]  # fmt: skip


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_rank(rank: int, num_processes: int, port: int, module: str, arguments: list[str]) -> None:
    """What a forked process does; never returns."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_processes), LOCAL_WORLD_SIZE=str(num_processes),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    sys.argv = [module, *arguments]
    status = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    num_processes, module, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    for library in _LIBRARIES:
        importlib.import_module(library)
    port = free_port()
    children = {}
    for rank in range(int(num_processes)):
        child = os.fork()
        if child == 0:
            run_rank(rank, int(num_processes), port, module, arguments)
        children[child] = rank
    failed = False
    while children:
        child, status = os.wait()
        rank = children.pop(child)
        if status and not failed:
            failed = True
            print(f"rank {rank} ended with status {os.waitstatus_to_exitcode(status)}", flush=True)
            for other in children:
                os.kill(other, signal.SIGKILL)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
