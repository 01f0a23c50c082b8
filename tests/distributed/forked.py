"""Runs a script of this folder in several processes that are forked from one, so that libraries are imported once.

Arguments: number of processes, module, its arguments. Every process sees what torchrun would tell it. A module's
`warm`, if it has one, is called before, to build once what every process needs. The first process that fails ends the
others.
"""

import importlib
import multiprocessing
import os
import runpy
import socket
import sys
import time

import torch
import torch.distributed as dist


def child(rank: int, module: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    runpy.run_module(module, run_name="__main__", alter_sys=False)


def main() -> None:
    size, module = int(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    warm = getattr(importlib.import_module(module), "warm", None)
    if warm is not None:
        warm()
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=child, args=(rank, module)) for rank in range(size)]
    for process in processes:
        process.start()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    codes: list[int | None] = [None] * size
    while None in codes and not any(codes):
        codes = [process.exitcode for process in processes]
        time.sleep(0.02)
    for process in processes:
        process.kill()
    del store
    if any(codes):
        sys.exit(f"{module}: exit codes of the ranks: {codes}")


if __name__ == "__main__":
    main()
