"""Count every sample of real documents and of photos: hf_dflop, the processor, and group_by_length's own pass.

All ways run in turn on the same rows in one process, without caches. Whether the counts agree with those of the
processor is part of the result.
"""

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from recipes.benchmarks.common.results import Row, make_result, save

NOTES = [
    "ms-swift 4.6: not measured: it requires transformers < 5.20, trl < 1.0 and an older datasets, so it cannot be "
    "installed beside the transformers that is benchmarked",
    "LLaMA-Factory 0.9.5: not measured: it requires torchvision, torchaudio and transformers ≤ 5.6, which would "
    "replace the torch and transformers that are benchmarked",
]
WAYS: dict[str, str] = {
    "hf_dflop": "hf_dflop.profile_dataset: lengths, tiles, patches, labels",
    "processor": "running the processor on every row (decoding its images), then looking at the length",
    "trainer_pass": "group_by_length without a length column: Trainer reads every processed row for its input_ids",
    "text_only": "tokenising the text alone: the length column that text recipes use, blind to images",
}


class ProcessedRows:
    """What a training script that processes rows as they are read gives to Trainer."""

    def __init__(self, rows: Any, process: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._rows, self._process = rows, process

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self._rows):
            raise IndexError(index)
        return {"input_ids": self._process(self._rows[index])["input_ids"][0].tolist()}


def measure(rows_of: dict[str, Any], processor: Any, config: Any, rounds: int) -> list[Row]:
    """Milliseconds a sample of every way, on each set of rows, in `rounds` rounds."""
    import datasets
    from transformers.trainer_pt_utils import LengthGroupedSampler

    import hf_dflop
    from hf_dflop.rows import Renderer, detect_layout, encode, read_row
    from hf_dflop.shapes import Shapes

    datasets.disable_progress_bars()
    datasets.disable_caching()
    renderer = Renderer(processor, "assistant")
    rows: list[Row] = []

    def processed(row: dict[str, Any], layout: Any) -> dict[str, Any]:
        encoded: dict[str, Any] = encode(processor, [read_row(row, layout)], renderer=renderer)
        return encoded

    for name, dataset in rows_of.items():
        layout = detect_layout(dataset[0], dataset.features)

        def ours(dataset: Any = dataset) -> list[int]:
            annotated, _ = hf_dflop.profile_dataset(dataset, processor, config=config, verify=0)
            return Shapes.of_dataset(annotated).llm_tokens.tolist()

        def run_processor(dataset: Any = dataset, layout: Any = layout) -> list[int]:
            return [int(processed(row, layout)["input_ids"].shape[1]) for row in dataset]

        def trainer_pass(dataset: Any = dataset, layout: Any = layout) -> list[int]:
            made = ProcessedRows(dataset, lambda row: processed(row, layout))
            return list(LengthGroupedSampler(6, dataset=made, model_input_name="input_ids").lengths)

        def text_only(dataset: Any = dataset) -> list[int]:
            texts = [
                "".join(part["text"] or "" for turn in row["messages"] for part in turn["content"])
                for row in dataset.select_columns(["messages"])
            ]
            return [len(ids) for ids in processor.tokenizer(texts)["input_ids"]]

        ways: dict[str, Callable[[], list[int]]] = {
            "hf_dflop": ours,
            "processor": run_processor,
            "trainer_pass": trainer_pass,
            "text_only": text_only,
        }
        hf_dflop.profile_dataset(dataset.select(range(8)), processor, config=config, verify=0)  # import and warm up
        for round_ in range(rounds):
            found: dict[str, list[int]] = {}
            spent: dict[str, float] = {}
            names = list(ways)
            for way in names[round_ % len(names) :] + names[: round_ % len(names)]:
                begin = time.process_time()
                found[way] = ways[way]()
                spent[way] = (time.process_time() - begin) / len(dataset) * 1e3
            rows += [
                {
                    "kind": "lengths",
                    "rows": name,
                    "num_rows": len(dataset),
                    "round": round_,
                    "way": way,
                    "ms_per_sample": float(f"{spent[way]:.5g}"),
                    "same_lengths": found[way] == found["processor"],
                }
                for way in names
            ]
        print(f"[bench] {name}: {len(dataset)} rows, {rounds} rounds", flush=True)
    datasets.enable_caching()
    datasets.enable_progress_bars()
    return rows


def photos(count: int, seed: int) -> Any:
    """Rows with one synthetic photo each, as large as a phone's, and a short conversation."""
    from datasets import Dataset
    from PIL import Image

    from recipes.demo.documents import FEATURES

    rng = np.random.default_rng(seed)
    files = []
    for width, height in ((2048, 1536), (1536, 2048), (1920, 1080), (2400, 1600)):
        coarse = Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, format="JPEG", quality=90)
        files.append(file.getvalue())
    rows = [
        {
            "id": f"photo#{i}",
            "page": "photos",
            "images": [{"bytes": files[i % len(files)], "path": None}],
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is in the picture?"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "A field of colours, " * (1 + i % 20)}]},
            ],
        }
        for i in range(count)
    ]
    return Dataset.from_list(rows, features=FEATURES)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.lengths", description=__doc__)
    parser.add_argument("--rows", type=int, default=128, help="of the documents (default: %(default)s)")
    parser.add_argument("--photos", type=int, default=144, help="synthetic photos (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=Path(".cache/demo"), help="downloads (default: %(default)s)")
    parser.add_argument("--no-save", action="store_true", help="do not write the result into the repository")
    given = parser.parse_args(arguments)
    from datasets import load_from_disk
    from transformers import AutoConfig, AutoProcessor

    from recipes.demo import prepare

    assets = prepare(given.cache)
    documents = load_from_disk(str(assets.dataset_path))["train"]
    rows = measure(
        {
            "documents": documents.select(range(min(given.rows, len(documents)))),
            "photos": photos(given.photos, seed=0),
        },
        AutoProcessor.from_pretrained(assets.model_path),
        AutoConfig.from_pretrained(assets.model_path),
        given.rounds,
    )
    if not given.no_save:
        result = make_result(
            "lengths",
            rows,
            command="python -m recipes.benchmarks.lengths",
            settings={"rounds": given.rounds, "documents": given.rows, "photos": given.photos},
            notes=NOTES,
        )
        print(f"[bench] {save(result)}")


if __name__ == "__main__":
    main()
