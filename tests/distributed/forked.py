"""Runs modules on several ranks, as torchrun would, in processes forked from one that has imported the libraries.

Importing them is half of the time of a short test; so it is done once, for all ranks of all launches. A launch is a
line of JSON on standard input: `module`, `arguments`, `num_processes` (0: one process without a rank), `environment`,
`output` (a file). The answers are two lines: the process group of the launch, and when all is over its exit status.
The environment of a rank is torchrun's. When one rank fails, the others are ended. What a script's `prepare()` makes
(into caches), and what it imports, is there once for all of its ranks: they are forked from a process that has it.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import traceback
from typing import Any

import torch

from hf_dflop.balance.warmup import warm_up
from tests.compiling import compiling
from tests.distributed import tiny

# What the scripts import. Nothing here may start threads: a fork takes only the calling one along.
_LIBRARIES = [
    "accelerate", "datasets", "peft", "torch.distributed.fsdp", "torch.distributed.pipelining",
    "torch.distributed.tensor", "transformers.trainer", "transformers.models.auto.modeling_auto",
    "transformers.models.llava.modeling_llava", "transformers.models.llama.modeling_llama",
    "transformers.models.clip.modeling_clip", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.gemma3.modeling_gemma3", "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "hf_dflop.integrations", "hf_dflop.pipeline", "tests.distributed.harness", "tests.distributed.pipelines",
]  # fmt: skip


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_module(module: str, arguments: list[str]) -> None:
    """What a forked process does; never returns."""
    sys.argv = [module, *arguments]
    status = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def prepare(module: str, arguments: list[str]) -> None:
    """Import what the ranks will, and what the script has for all of them; as `__main__` it is run in each rank."""
    sys.argv = [module, *arguments]
    imported = importlib.import_module(module)
    if hasattr(imported, "prepare"):
        imported.prepare()
    del sys.modules[module]
    gc.freeze()


def run_ranks(module: str, arguments: list[str], num_processes: int) -> int:
    """Fork all ranks and wait for them; returns the exit status."""
    if num_processes > 1:
        prepare(module, arguments)
    port = free_port()
    children = {}
    for rank in range(num_processes):
        child = os.fork()
        if child == 0:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_processes),
                LOCAL_WORLD_SIZE=str(num_processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
            run_module(module, arguments)
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
    return int(failed)


def run_launch(launch: dict[str, Any]) -> None:
    """What the process of a launch does; never returns."""
    os.setsid()
    output = os.open(launch["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(launch["environment"])
    if launch["num_processes"] == 0:
        run_module(launch["module"], launch["arguments"])
    status = 1
    try:
        status = run_ranks(launch["module"], launch["arguments"], launch["num_processes"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    torch.set_num_threads(1)
    for library in _LIBRARIES:
        importlib.import_module(library)
    with compiling():  # the others find it done
        for padded in (True, False):
            warm_up(objective="step", padded=padded)
    with tempfile.TemporaryDirectory() as folder:  # transformers reads its table of renamed weights at the first time
        tiny.model().save_pretrained(folder)
    gc.freeze()  # Trainer collects garbage whenever it trains: what all libraries made would be gone through each time
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run_launch(json.loads(line))
        print(child, file=answers, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    main()
