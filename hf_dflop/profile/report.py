"""What a dataset is made of: totals and quantiles of its shape columns, and figures.

Input: `Shapes`. Output: `DatasetProfile`, which prints, saves (`profile.json`, `shapes.npz`, figures where
matplotlib is installed, a page where plotly is) and loads. The per-sample counts are kept, since planning draws
global batches from them.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.cost import ModelSpec
from hf_dflop.errors import DatasetError
from hf_dflop.profile.bad_rows import RowError
from hf_dflop.profile.distinct import distinct, quantiles
from hf_dflop.shapes import SHAPE_COLUMNS, Shapes

__all__ = ["DatasetProfile"]

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetProfile:
    """Totals and quantiles of a dataset's shape columns.

    Example:
        >>> shapes = Shapes(num_images=[1, 0], image_tiles=[2, 0], image_patches=[8, 0], image_patches_sq=[32, 0],
        ...                 image_tokens=[8, 0], text_tokens=[4, 6], label_tokens=[2, 3])
        >>> profile = DatasetProfile.from_shapes(shapes)
        >>> profile.totals["text_tokens"], profile.quantiles["llm_tokens"]["1.0"]
        (10, 12.0)
    """

    num_samples: int
    """Rows of the dataset."""
    totals: dict[str, int]
    """Sum of each count over the dataset, by the field names of `Shapes`, and `llm_tokens`."""
    quantiles: dict[str, dict[str, float]]
    """Quantiles of each count over the samples: name → {"0.5": median, ...}."""
    provenance: dict[str, Any]
    """Where the dataset came from and what it was annotated with."""
    shapes: Shapes | None = None
    """Counts of every sample; `None` in a profile that was saved without them."""
    errors: tuple[RowError, ...] = ()
    """Rows that are not usable, with the reason; see `on_error` of `profile_dataset`."""
    spec: ModelSpec | None = None
    """Structure of the model, from which the report computes costs; `None` where its config was not known."""
    subset_names: tuple[str, ...] = ()
    """Sub-datasets of a mixture, where a column such as `source` names them."""
    subset: npt.NDArray[np.int64] | None = None
    """`(num_samples,)` position in `subset_names` of each sample."""

    @classmethod
    def from_shapes(
        cls,
        shapes: Shapes,
        *,
        provenance: dict[str, Any] | None = None,
        errors: Sequence[RowError] = (),
        unusable: Sequence[int] = (),
        spec: ModelSpec | None = None,
        subset_names: Sequence[str] = (),
        subset: npt.NDArray[np.int64] | None = None,
    ) -> "DatasetProfile":
        """Summarise shapes.

        Args:
            shapes (`Shapes`): counts of every sample.
            provenance (`dict`, *optional*): where they come from.
            errors (`Sequence[RowError]`): rows that are not usable.
            unusable (`Sequence[int]`): samples of `shapes` that are such rows; they are left out.
            spec (`ModelSpec`, *optional*): structure of the model.
            subset_names (`Sequence[str]`), subset (`(num_samples,)` of int64): sub-dataset of each sample.

        Raises:
            DatasetError: there are no samples.
        """
        if not len(shapes):
            raise DatasetError("there are no samples to profile")
        found = distinct(shapes, unusable)
        return cls(
            num_samples=len(shapes),
            totals={name: int(values @ times) for name, (values, times) in found.items()},
            quantiles={
                name: {str(q): value for q, value in zip(QUANTILES, quantiles(*each, QUANTILES), strict=True)}
                for name, each in found.items()
            },
            provenance=dict(provenance or {}),
            shapes=shapes,
            errors=tuple(errors),
            spec=spec,
            subset_names=tuple(subset_names),
            subset=subset,
        )

    @classmethod
    def merge(cls, profiles: "Iterable[DatasetProfile]") -> "DatasetProfile":
        """The profile of a whole dataset from those of all its parts (see `shard` of `profile_dataset`), exactly.

        Args:
            profiles (`Iterable[DatasetProfile]`): one of each part, in any order.

        Raises:
            DatasetError: a part is missing, there twice or without samples, or parts are of different runs.
        """
        from hf_dflop.profile.merge import merge

        return merge(list(profiles))

    @property
    def shown(self) -> dict[str, dict[str, float]]:
        """The quantiles without those of a kind that no sample has: of sounds, or of images where there are sounds."""
        hears, sees = self.totals.get("num_audios"), self.totals["num_images"]
        hidden = [kind for kind, used in (("audio", hears), ("image", sees or not hears)) if not used]
        return {name: q for name, q in self.quantiles.items() if not any(kind in name for kind in hidden)}

    def summary(self) -> str:
        """The profile as a text table."""
        shown = ("0.05", "0.5", "0.95", "0.99", "1.0")
        heads = ("5 %", "median", "95 %", "99 %", "max")
        lines = [f"{self.num_samples:,} samples", f"{'':18}{'total':>16}" + "".join(f"{h:>12}" for h in heads)]
        for name, values in self.shown.items():
            cells = "".join(f"{values[q]:>12,.0f}" for q in shown)
            lines.append(f"{name:18}{self.totals[name]:>16,}{cells}")
        if self.errors:
            lines.append(f"{len(self.errors):,} rows are not usable; the first: {self.errors[0].reason}")
        return "\n".join(lines)

    def save(
        self, directory: str | Path, *, samples: bool = True, dataset: Any = None, ranks: Sequence[int] | None = None
    ) -> None:
        """Write `profile.json`, `shapes.npz`, figures (with matplotlib), and `report.html` (with plotly and jinja2).

        Args:
            directory (`str` or `Path`): folder to write to; made where it is missing.
            samples (`bool`, defaults to `True`): `False` writes `profile.json` alone.
            dataset (`datasets.Dataset`, *optional*): the annotated dataset; the report then shows pictures of the
                costliest samples.
            ranks (`Sequence[int]`, *optional*): numbers of data-parallel ranks for which the report predicts how long
                they wait for each other; 2, 8 and 64 by default.

        Raises:
            ValueError: a number of ranks is below 2.
        """
        if ranks is not None and (not ranks or min(ranks) < 2):
            raise ValueError(f"ranks is {list(ranks)}; name numbers of ranks of at least 2")
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        written = {
            "format": _FORMAT,
            "num_samples": self.num_samples,
            "totals": self.totals,
            "quantiles": self.quantiles,
            "provenance": self.provenance,
            "errors": [asdict(error) for error in self.errors],
            "spec": None if self.spec is None else self.spec.to_dict(),
            "subset_names": list(self.subset_names),
        }
        (folder / "profile.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        (folder / "shapes.npz").unlink(missing_ok=True)
        if samples and self.shapes is not None:
            columns: dict[str, Any] = dict(self.shapes.to_columns())
            if self.subset is not None:
                columns["subset"] = self.subset
            np.savez_compressed(folder / "shapes.npz", **columns)
            _draw(self.shapes, folder)
            if find_spec("jinja2") is not None and find_spec("plotly") is not None:
                from hf_dflop.profile.page import render_page

                given = {} if ranks is None else {"ranks": tuple(ranks)}
                (folder / "report.html").write_text(render_page(self, dataset, **given), encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> "DatasetProfile":
        """Read a profile that `save` wrote.

        Raises:
            DatasetError: the folder holds no profile, or one of a newer format.
        """
        path = Path(directory) / "profile.json"
        if not path.is_file():
            raise DatasetError(f"{path} is not there; pass a folder that DatasetProfile.save wrote")
        read = json.loads(path.read_text(encoding="utf-8"))
        if read.pop("format", None) != _FORMAT:
            raise DatasetError(f"{path} has another format than {_FORMAT}; profile the dataset again")
        shapes = subset = None
        if (samples := path.with_name("shapes.npz")).is_file():
            with np.load(samples, allow_pickle=False) as file:
                shapes = Shapes.from_columns({name: file[name] for name in SHAPE_COLUMNS if name in file})
                subset = file.get("subset")
        errors = tuple(RowError(**error) for error in read.pop("errors", ()))
        spec = read.pop("spec", None)
        names = tuple(read.pop("subset_names", ()))
        return cls(
            **read,
            shapes=shapes,
            errors=errors,
            spec=None if spec is None else ModelSpec.from_dict(spec),
            subset_names=names,
            subset=subset,
        )


def _draw(shapes: Shapes, folder: Path) -> None:
    """profile.png and profile.svg: joint histogram of both workloads, and how much the largest samples weigh."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    joint, tail = figure.subplots(1, 2)
    patches, tokens = shapes.encoder_inputs, shapes.llm_tokens
    kind = "patches and frames" if shapes.num_audios.any() and shapes.num_images.any() else "patches"
    kind = "frames" if shapes.num_audios.any() and not shapes.num_images.any() else kind
    counts, x_edges, y_edges = np.histogram2d(patches, tokens, bins=40)
    mesh = joint.pcolormesh(x_edges, y_edges, np.where(counts.T > 0, counts.T, np.nan), norm="log", cmap="viridis")
    figure.colorbar(mesh, ax=joint, label="samples")
    joint.set(xlabel=f"{kind} (encoder)", ylabel="LLM tokens", title="What each module gets per sample")
    share = np.arange(1, len(shapes) + 1) / len(shapes)
    for values, label in ((patches, kind), (tokens, "LLM tokens")):
        heaviest = np.sort(values)[::-1].cumsum()
        if heaviest[-1]:
            tail.plot(share, heaviest / heaviest[-1], label=label)
    tail.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--", label="all samples equal")
    tail.set(xlabel="share of samples, heaviest first", ylabel="share of the total", title="Tail")
    tail.legend()
    figure.savefig(folder / "profile.png", dpi=120)
    figure.savefig(folder / "profile.svg")
