"""Each rank of a pipeline is killed in turn, in a forward, in a backward and while a checkpoint is being saved.

Arguments: a folder, places (comma separated: forward, backward, save), ranks that die in each of them (comma
separated; or "1/0/2": one for each place). Processes are forked from this one, without a launcher that would end the
others: each must notice by itself. For every case: the others end with an error in time, and the newest checkpoint is
that of an undisturbed run, bit by bit. In the last case it is resumed, and ends where the undisturbed run does.
"""

import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from hf_dflop.integrations import DflopTrainer
from hf_dflop.pipeline import PipelineModel
from hf_dflop.pipeline.stage import RaggedStage
from hf_dflop.plan import ModulePlan, Plan
from tests.distributed.ingredients import ingredients
from tests.distributed.scripts.pipeline_trainer import arguments

SIZE, STEPS, SAVE_STEPS, MICROBATCHES = 3, 4, 2, 4
LIMIT_S = 30
PLAN = Plan(
    vision=ModulePlan(layers=(2,)), llm=ModulePlan(layers=(1, 1)), num_microbatches=MICROBATCHES, balance=False
)


def train(rank: int, folder: Path, victim: int | None, where: str, resume: str | None) -> None:
    """What one rank runs."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    args = arguments(folder, save_strategy="steps", save_steps=SAVE_STEPS, max_steps=STEPS)
    assert args.device.type == "cpu"  # makes the process group
    built, rows, collator = BUILT
    trainer = DflopTrainer(PipelineModel.from_model(built, plan=PLAN, check=False), args, collator, train_dataset=rows)
    if rank == victim:
        die_in(trainer, where)
    trainer.train(resume_from_checkpoint=resume)
    torch.distributed.destroy_process_group()


def die_in(trainer: DflopTrainer, where: str) -> None:
    """Kill this process as a crash of the machine would: at the third step, or at the second checkpoint."""

    def dying(stock: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if when(*given):
                os.kill(os.getpid(), signal.SIGKILL)
            return stock(*given, **named)

        return call

    def step(stage: Any, microbatch: int, *rest: Any) -> bool:
        return trainer.state.global_step == SAVE_STEPS and microbatch == 1

    if where == "save":
        torn = dying(trainer._save_rng_state, lambda folder: trainer.state.global_step == STEPS)
        trainer._save_rng_state = torn  # type: ignore[method-assign]
    else:
        name = f"{where}_one_chunk"
        setattr(RaggedStage, name, dying(getattr(RaggedStage, name), step))


def run(folder: Path, victim: int | None = None, where: str = "", resume: str | None = None) -> dict[int, Any]:
    """All ranks; returns exit code and time of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=train, args=(rank, folder, victim, where, resume)) for rank in range(SIZE)]
    for process in processes:
        process.start()
    ended: dict[int, Any] = {}
    begin = time.monotonic()
    while len(ended) < SIZE and time.monotonic() - begin < 4 * LIMIT_S:
        for rank, process in enumerate(processes):
            if rank not in ended and process.exitcode is not None:
                ended[rank] = (process.exitcode, time.monotonic())
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()
    return ended


def same_weights(first: str, second: str) -> None:
    """Weights and optimizer state are equal, bit by bit."""
    found, expected = load_file(f"{first}/model.safetensors"), load_file(f"{second}/model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    files = sorted(path.name for path in Path(second).iterdir())
    assert sorted(path.name for path in Path(first).iterdir()) == files, files
    shards = sorted(path.name for path in Path(second, "optimizer").glob("*.safetensors"))
    assert shards
    for shard in shards:
        ours, theirs = (load_file(f"{side}/optimizer/{shard}") for side in (first, second))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def main(folder: Path, cases: list[tuple[str, int]]) -> None:
    undisturbed = folder / "undisturbed"
    ended = run(undisturbed)
    assert [ended[rank][0] for rank in range(SIZE)] == [0] * SIZE, ended
    for where, victim in cases:
        killed = folder / f"{where}{victim}"
        ended = run(killed, victim, where)
        assert len(ended) == SIZE, f"rank {victim} died in {where}; ended: {ended}"
        assert ended[victim][0] == -signal.SIGKILL, ended
        waited = {rank: at - ended[victim][1] for rank, (_, at) in ended.items() if rank != victim}
        assert all(ended[rank][0] != 0 for rank in waited), ended
        assert max(waited.values()) <= LIMIT_S, waited
        newest = get_last_checkpoint(str(killed))
        assert newest == str(killed / f"checkpoint-{SAVE_STEPS}"), newest
        same_weights(newest, str(undisturbed / f"checkpoint-{SAVE_STEPS}"))
        if (where, victim) == cases[-1]:
            ended = run(killed, resume=newest)
            assert [ended[rank][0] for rank in range(SIZE)] == [0] * SIZE, ended
            same_weights(str(killed / f"checkpoint-{STEPS}"), str(undisturbed / f"checkpoint-{STEPS}"))
            assert not list(killed.glob("_saving-*"))
        shutil.rmtree(killed)
        print(f"killed: rank {victim} in {where}; the others ended in {max(waited.values()):.1f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(SIZE), "LOCAL_WORLD_SIZE": str(SIZE)}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    BUILT = ingredients(torch.float32)
    places, ranks = sys.argv[2].split(","), sys.argv[3]
    if "/" in ranks:
        cases = list(zip(places, map(int, ranks.split("/")), strict=True))
    else:
        cases = [(place, int(rank)) for place in places for rank in ranks.split(",")]
    main(Path(sys.argv[1]), cases)
