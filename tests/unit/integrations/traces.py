"""Made-up traces of whole runs, with a slow rank and a module that was priced wrongly."""

import json
from pathlib import Path

import numpy as np


def write_run(
    folder: Path, *, ranks: int = 4, steps: int = 40, slots: int = 3, slow: int | None = 2, vision_off: float = 1.0
) -> None:
    """`slow` takes 1.35 times as long; vision takes `vision_off` times what version 0 predicts."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[list[str]] = [[] for _ in range(ranks)]
    clock = np.arange(ranks) * 1000.0  # clocks of machines do not agree
    for step in range(1, steps + 1):
        vision, llm = rng.lognormal(-2.2, 0.4, (2, ranks, slots))
        version = int(step > steps // 2)
        factor = np.where(np.arange(ranks) == slow, 1.35, 1.0)[:, None]
        true = (vision * vision_off + llm) * factor * rng.lognormal(0, 0.02, vision.shape)
        priced = vision * (vision_off if version else 1.0)
        data = rng.lognormal(-4, 0.3, ranks)
        begin = clock + data.max()
        ends = begin[:, None] + true.cumsum(axis=1)
        sync = float((ends[:, -1] - begin).max()) + 0.02
        for rank in range(ranks):
            record = {
                "step": step, "epoch": 0, "rank": rank, "num_ranks": ranks, "begin_s": begin[rank],
                "data_s": data[rank], "slot_end_s": ends[rank].tolist(), "sync_end_s": begin[rank] + sync,
                "end_s": begin[rank] + sync + 0.015, "cost_version": version,
                "samples": rng.integers(0, 10_000, (slots, 4)).tolist(),
                "slot_predicted_s": (priced + llm)[rank].tolist(), "slot_vision_s": priced[rank].tolist(),
            }  # fmt: skip
            if step == 1:
                record["host"] = f"node{rank // 2}"
            lines[rank].append(json.dumps(record))
        clock = begin + sync + 0.015
    for rank in range(ranks):
        (folder / f"trace-rank{rank:05d}.jsonl").write_text("\n".join(lines[rank]) + "\n")
