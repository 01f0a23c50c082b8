"""Ranks read a checkpoint whose files of other ranks are cut off behind their headers once they are open: reading from
such a file kills. Arguments: `share` (3 processes), or `whole` (1 process, which loads everything and dies).
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, modeling_utils

from hf_dflop.pipeline import PipelineModel, reading
from tests.distributed import pipelines as p


def write(folder: Path) -> dict[str, str]:
    """A checkpoint in two files; the part of the model → its file."""
    p.model("llava", torch.float32).save_pretrained(folder)
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    file.unlink()
    parts = {"llm": {k: v for k, v in state.items() if k.startswith(("language_model", "lm_head"))}}
    parts["vision"] = {k: v for k, v in state.items() if k not in parts["llm"]}
    names = {part: f"model-{number:05}-of-00002.safetensors" for number, part in enumerate(parts, 1)}
    for part, name in names.items():
        assert parts[part]
        save_file(parts[part], folder / name, metadata={"format": "pt"})
    weight_map = {key: names[part] for part in parts for key in parts[part]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


def cut(name: str) -> None:
    """From now on, the file of that name is cut when it is opened."""

    def opened(path: str, *args: Any, **kwargs: Any) -> Any:
        found = safe_open(path, *args, **kwargs)
        if Path(path).name == name:
            with open(path, "r+b") as file:
                file.truncate(8 + int.from_bytes(file.read(8), "little"))
        return found

    reading.safe_open = modeling_utils.safe_open = opened  # type: ignore[attr-defined]


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    names = write(folder)
    if sys.argv[1] == "whole":
        cut(names["llm"])
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64)
        return
    worlds = p.Worlds()
    with worlds.of(3):
        expected = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).state_dict()
        cut(names["vision" if worlds.rank else "llm"])
        pipe = PipelineModel.from_pretrained(str(folder), plan=p.plan((1, 2, 1)), dtype=torch.float64)
        found = pipe.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert p.covered(pipe)
        print(f"reading: {len(found)} of {len(expected)} on rank {worlds.rank}", flush=True)


if __name__ == "__main__":
    main()
