"""Rows per second and peak memory of `profile_dataset` at several numbers of rows.

    python -m recipes.benchmarks.annotation --rows 10000 1000000

Rows are short dialogues without pictures (40 tokens on average), kept in a file and read through a memory map, and
counted by a LLaVA processor that is built here, or by `--processor`. Each size runs in a process of its own, on one
thread. Memory is what the process itself holds (anonymous pages, sampled), without the mapped file; "counting" is
the growth from the start of the call to its peak.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

SENTENCE = "what is in the image a cat on the roof near the sea and two boats under grey clouds"
WORDS = SENTENCE.split()


def processor_of(name: str | None) -> Any:
    """The named processor, or a small LLaVA one with a tokenizer trained on `WORDS`."""
    from transformers import AutoProcessor, LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    if name is not None:
        return AutoProcessor.from_pretrained(name)
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator([SENTENCE], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    special = ["<image>", "<pad>", "</s>", "<|im_start|>", "<|im_end|>"]
    model.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", extra_special_tokens={"image_token": "<image>"}
    )
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return LlavaProcessor(
        CLIPImageProcessorPil(), tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    )  # fmt: skip


def write_rows(path: Path, num_rows: int) -> None:
    """Dialogues of 4 to 12 words of question and 2 to 30 words of answer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    some = [" ".join(rng.choice(WORDS, int(k))) for k in rng.integers(4, 13, 2000)]
    more = [" ".join(rng.choice(WORDS, int(k))) for k in rng.integers(2, 31, 2000)]
    schema = pa.schema([("question", pa.string()), ("answer", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_rows, 100_000):
            size = min(100_000, num_rows - start)
            picked = rng.integers(0, 2000, (2, size))
            columns = [
                pa.array([source[i] for i in which]) for source, which in zip((some, more), picked, strict=True)
            ]
            writer.write_table(pa.table(columns, schema=schema))


class PeakMemory(threading.Thread):
    """Samples the anonymous memory of this process (Linux)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0

    @staticmethod
    def now_bytes() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    def run(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, self.now_bytes())
            time.sleep(0.02)


def measure(path: Path, processor: str | None) -> dict[str, float]:
    """Count the rows of a file once."""
    import datasets

    from hf_dflop.profile import profile_dataset

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(path.parent / "cache"))
    loaded = processor_of(processor)
    profile_dataset(rows.select(range(64)), loaded)
    datasets.disable_caching()
    before, watch = PeakMemory.now_bytes(), PeakMemory()
    watch.start()
    start = time.perf_counter()
    _, profile = profile_dataset(rows, loaded)
    wall_s = time.perf_counter() - start
    return {
        "num_rows": len(rows),
        "rows_per_s": len(rows) / wall_s,
        "tokens_per_row": profile.totals["llm_tokens"] / len(rows),
        "before_bytes": before,
        "counting_bytes": watch.peak_bytes - before,
    }


def main() -> None:
    """Measure every size in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--processor", help="id or folder of a processor; without it a small one is built")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.file is not None:
        print(json.dumps(measure(options.file, options.processor)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for num_rows in options.rows:
            path = Path(folder) / f"{num_rows}.parquet"
            write_rows(path, num_rows)
            command = [sys.executable, "-m", "recipes.benchmarks.annotation", "--file", str(path)]
            command += ["--processor", options.processor] if options.processor else []
            threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            results.append(json.loads(done.stdout.splitlines()[-1]))
    if options.json:
        print(json.dumps(results))
        return
    print(f"{'rows':>10} {'rows/s':>8} {'tokens/row':>11} {'before, MiB':>12} {'counting, MiB':>14} {'bytes/row':>10}")
    for found in results:
        before, grown = found["before_bytes"] / 2**20, found["counting_bytes"] / 2**20
        per_row = found["counting_bytes"] / found["num_rows"]
        print(
            f"{found['num_rows']:>10,} {found['rows_per_s']:>8,.0f} {found['tokens_per_row']:>11.1f} {before:>12.0f} "
            f"{grown:>14.0f} {per_row:>10.0f}"
        )


if __name__ == "__main__":
    main()
