"""The environment of processes that train beside each other on a CPU, the demo's and the benchmarks'."""

import os

__all__ = ["process_environment"]

_KEEP_LARGE_BLOCKS = {"hugetlb": 1, "mmap_threshold": 4 << 30, "trim_threshold": 8 << 30, "top_pad": 256 << 20}


def process_environment() -> dict[str, str]:
    """This process's environment, for launching processes with one thread each, offline and quiet."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        # The logits of one microbatch are hundreds of MB. glibc would return such blocks to the kernel and have them
        # zeroed anew each time; two processes doing that wait for each other's memory, which no sampler can balance.
        "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in _KEEP_LARGE_BLOCKS.items()),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
    }
