"""One self-contained HTML page about a profile, for someone who has never seen the project.

Inputs: a profile that has its samples, and optionally the dataset, for pictures of the costliest samples.
Output: the page as text; scripts and pictures are inside it.

Assumptions: costs are training FLOPs from the model's config, both modules at the same speed; without a config,
encoder patches (of sounds, frames) and LLM tokens stand for cost, and waiting is not predicted.
"""

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hf_dflop.cost import CostModel
from hf_dflop.errors import DflopError
from hf_dflop.profile import figures
from hf_dflop.profile.source import without_decoding
from hf_dflop.profile.waiting import RANKS, SAMPLES_PER_RANK, Waiting, predict_waiting
from hf_dflop.rows import load_image

if TYPE_CHECKING:
    from hf_dflop.profile.report import DatasetProfile

__all__ = ["advice", "render_page"]

_TEMPLATE = Path(__file__).with_name("page.html.j2")
_TAIL_ROWS = 20
_MAX_SUBSETS = 20
_THUMBNAIL_PIXELS = 112
_SHOWN_ERRORS = 50
_WORTH_IT = 0.05
"""Predicted saving of step time from which balancing is advised."""


def render_page(profile: "DatasetProfile", dataset: Any = None, ranks: Sequence[int] = RANKS) -> str:
    """The page.

    Args:
        profile (`DatasetProfile`): a profile with samples.
        dataset (`datasets.Dataset`, *optional*): the annotated dataset, for thumbnails.
        ranks (`Sequence[int]`): numbers of data-parallel ranks for which waiting is predicted.
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    shapes = profile.shapes
    assert shapes is not None
    if profile.spec is not None:
        cost = CostModel.analytic(profile.spec)  # at 1e12 FLOP/s, seconds are TFLOP
        vision, llm, unit = cost.vision_s(shapes), cost.llm_s(shapes), "TFLOP"
        waiting = predict_waiting(_usable(profile), cost, ranks=ranks)
    else:
        vision, llm, unit = shapes.encoder_inputs.astype(float), shapes.llm_tokens.astype(float), "positions"
        waiting = []
    total = vision + llm
    heaviest = [int(i) for i in np.argsort(-total, kind="stable")[:_TAIL_ROWS]]
    ordered = np.sort(total)[::-1]
    groups = _subsets(profile, total)
    hears, sees = bool(shapes.num_audios.any()), bool(shapes.num_images.any())
    encoder = "encoders" if hears and sees else "audio encoder" if hears else "vision encoder"
    plots = {"joint": figures.joint(shapes, vision, llm, unit, encoder), "tail": figures.tail(vision, llm, encoder)}
    if waiting:
        plots["waiting"] = figures.waiting(waiting)
    if groups:
        plots["subsets"] = figures.subsets(
            [g["name"] for g in groups], *(np.array([g[key] for g in groups]) for key in ("of_samples", "of_cost"))
        )
    html = {
        name: figure.to_html(
            full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
        )
        for name, figure in plots.items()
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        plotlyjs=get_plotlyjs(),
        plots=html,
        profile=profile,
        unit=unit,
        encoder=encoder,
        hears=hears,
        sees=sees or not hears,
        advice=advice(profile, waiting),
        waiting=waiting,
        way_names=figures.WAY_NAMES,
        samples_per_rank=SAMPLES_PER_RANK,
        groups=groups,
        tail={
            "top_tenth": _share(ordered[: max(1, ordered.size // 10)].sum(), ordered.sum()),
            "largest_to_median": _share(ordered[0], float(np.median(ordered))),
            "vision": _share(vision.sum(), total.sum()),
        },
        samples=_tail_rows(profile, heaviest, vision, llm, dataset),
        errors=profile.errors[:_SHOWN_ERRORS],
    )


def advice(profile: "DatasetProfile", waiting: list[Waiting]) -> str:
    """One sentence: whether balancing is worth it for this dataset, and why."""
    if not waiting:
        return "Pass the model's config (or a model id) when profiling, and this page predicts how long ranks wait."
    by_way = {way: {w.num_ranks: w for w in waiting if w.way == way} for way in figures.WAY_NAMES}
    ranks = min((n for n, w in by_way["balanced"].items() if w.time_to_stock < 1 - _WORTH_IT), default=None)
    if ranks is None:
        largest = max(by_way["stock"])
        return (
            f"Samples of this dataset cost so nearly the same that ranks wait only "
            f"{by_way['stock'][largest].idle_fraction:.0%} of a step at {largest} ranks: the stock sampler is enough."
        )
    stock, own = by_way["stock"][ranks], by_way["balanced"][ranks]
    most = max(by_way["balanced"])
    later = by_way["balanced"][most]
    more = f" ({1 - later.time_to_stock:.0%} less at {most} ranks)" if most != ranks else ""
    return (
        f"Balance this dataset: at {ranks} ranks, GPUs are predicted to wait {stock.idle_fraction:.0%} of each step "
        f"under stock sampling and {own.idle_fraction:.0%} with DflopCallback, whose steps take "
        f"{1 - own.time_to_stock:.0%} less time{more}."
    )


def _share(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else 0.0


def _usable(profile: "DatasetProfile") -> Any:
    shapes = profile.shapes
    assert shapes is not None
    return shapes.select(np.flatnonzero(shapes.llm_tokens > 0)) if shapes.llm_tokens.any() else shapes


def _subsets(profile: "DatasetProfile", total: npt.NDArray[np.float64]) -> list[dict[str, Any]]:
    """Shares of each sub-dataset, the costliest first; small ones are summed up."""
    if profile.subset is None or len(profile.subset_names) < 2:
        return []
    size = len(profile.subset_names)
    samples = np.bincount(profile.subset, minlength=size) / total.size
    costs = np.bincount(profile.subset, weights=total, minlength=size) / (total.sum() or 1)
    order = np.argsort(-costs, kind="stable")
    rows = [
        {"name": profile.subset_names[i][:60], "of_samples": float(samples[i]), "of_cost": float(costs[i])}
        for i in order[:_MAX_SUBSETS]
    ]
    if (rest := order[_MAX_SUBSETS:]).size:
        name = f"{rest.size} others"
        rows.append({"name": name, "of_samples": float(samples[rest].sum()), "of_cost": float(costs[rest].sum())})
    return rows


def _tail_rows(
    profile: "DatasetProfile",
    picked: list[int],
    vision: npt.NDArray[np.float64],
    llm: npt.NDArray[np.float64],
    dataset: Any,
) -> list[dict[str, Any]]:
    shapes = profile.shapes
    assert shapes is not None
    raw, column = None, profile.provenance.get("image_column")
    if column is not None and hasattr(dataset, "select_columns") and hasattr(dataset, "__len__"):
        raw = without_decoding(dataset).select_columns([column]) if len(dataset) == len(shapes) else None
    median = float(np.median(vision + llm)) or 1.0
    return [
        {
            "index": i,
            "subset": "" if profile.subset is None else profile.subset_names[profile.subset[i]][:40],
            "images": int(shapes.num_images[i]),
            "tiles": int(shapes.image_tiles[i]),
            "image_tokens": int(shapes.image_tokens[i]),
            "sounds": int(shapes.num_audios[i]),
            "sound_s": float(shapes.audio_ms[i]) / 1000,
            "audio_tokens": int(shapes.audio_tokens[i]),
            "text_tokens": int(shapes.text_tokens[i]),
            "vision": float(vision[i]),
            "llm": float(llm[i]),
            "to_median": float(vision[i] + llm[i]) / median,
            "pictures": [] if raw is None else _thumbnails(raw[i][column]),
        }
        for i in picked
    ]


def _thumbnails(cells: Any) -> list[str]:
    """Up to three pictures of a row as data URLs; one that cannot be read is left out."""
    pictures = []
    for cell in (cells if isinstance(cells, list) else [cells])[:3]:
        if cell is None:
            continue
        try:
            picture = load_image(cell)
            picture = picture.convert("RGB")
        except (DflopError, OSError, ValueError):
            continue
        picture.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
        file = BytesIO()
        picture.save(file, "JPEG", quality=70)
        pictures.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
    return pictures
