"""Does a model give joined samples the logits that they have alone?

Two questions, asked of the model itself on a few rows:

    equal    the logits of every sample in the joined row are those of the sample alone, to rounding
    no leak  changing one sample (its text; its images) moves no other sample's logits by a single bit

The second is the sharper one: what is masked enters a softmax with weight exactly zero, so with the shapes unchanged
not even rounding may differ. It holds in every precision, while the first can only be as sharp as the precision.

Assumption: in the padded microbatch the entries of image keys follow the order of the rows, so that the entries of
a sample can be found by their number when it is collated alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hf_dflop.data.packed import PackedCollator
from hf_dflop.errors import ModelError
from hf_dflop.rows.encode import IGNORE

__all__ = ["PackingCheck", "check_packing", "evaluating"]

_TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
"""Largest difference of a logit ÷ largest logit. Rounding, amplified about 80 times by depth and by sums taken in
another order; a wrong position or a visible neighbour changes the first digits."""
_HALF_TOLERANCE_EPS = 4
_HALF_TOLERANCE_NOISE = 4
"""In half precision: so many units of rounding, or so many times what padding alone changes, whatever is more."""
_REMEDY = "Use a padding collator (VisionLanguageCollator) for this model"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingCheck:
    """What `check_packing` found."""

    error: float
    """Largest difference between a logit in the joined row and alone ÷ largest logit."""
    tolerance: float
    """The largest error that rounding explains."""
    num_samples: int
    num_text_probes: int
    """Samples whose text was changed, without moving another sample."""
    num_image_probes: int
    """Samples whose images were changed, without moving another sample."""


def check_packing(model: Any, collator: PackedCollator, rows: Sequence[Mapping[str, Any]]) -> PackingCheck:
    """Compare packed with unpacked logits, and probe for leaks between samples.

    Runs `2 + 3 × len(rows)` forward passes at most, so give few and short rows, with images and without.

    Args:
        model (`PreTrainedModel`): the model, on its device; left as it was found.
        collator ([`PackedCollator`]): the collator that is checked.
        rows (`Sequence[Mapping]`): at least two rows as the collator takes them.

    Returns:
        [`PackingCheck`]: the errors that were measured.

    Raises:
        ModelError: the model does not keep joined samples apart; with the reason and the remedy.
    """
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} rows were given; joining needs at least 2")
    name = collator.structure.model_class.__name__
    padded = collator.collator(rows)
    alone = [collator.collator([row]) for row in rows]
    packed = collator.pack(padded)
    # Of each sample its own row; another, at the end, is a dummy image of the collator.
    lengths = [int(batch["attention_mask"][0].sum()) for batch in alone]
    pieces = [*lengths, packed["input_ids"].shape[1] - sum(lengths)]
    with evaluating(model):
        try:
            found = _logits(model, packed).split(pieces)[: len(rows)]
        except Exception as error:
            what = (str(error).strip() or "no message").splitlines()[0]
            raise ModelError(
                f"{name} with {collator.structure.attention} attention fails on a packed microbatch: "
                f"{type(error).__name__}: {what}. {_REMEDY}, or another attn_implementation"
            ) from error
        expected = [_logits(model, batch)[batch["attention_mask"][0].bool()] for batch in alone]
        tolerance = _tolerance(model, padded, expected)
        errors = [_difference(one, other) for one, other in zip(found, expected, strict=True)]
        probes = {"text": 0, "images": 0}
        leaks = []
        for sample, kind, changed in _changes(packed, alone, lengths, collator.structure.image_marks):
            moved = [
                not one.equal(other)
                for one, other in zip(_logits(model, changed).split(pieces)[: len(rows)], found, strict=True)
            ]
            leaks += [
                f"changing the {kind} of sample {sample} moves sample {k}"
                for k, m in enumerate(moved)
                if m and k != sample
            ]
            probes[kind] += moved[sample]
    worst = max(range(len(rows)), key=lambda k: errors[k])
    reasons = leaks[:1]
    if not errors[worst] <= tolerance:
        reasons.insert(
            0,
            f"the logits of sample {worst} differ by {errors[worst]:.1e} of the largest logit (rounding explains "
            f"{tolerance:.0e})",
        )
    if not probes["text"] + probes["images"]:
        reasons.append("no change of a sample moved its own logits, so a leak could not have been seen")
    if reasons:
        raise ModelError(
            f"{name} with {collator.structure.attention} attention does not keep the samples of a packed row apart: "
            f"{'; '.join(reasons)}. {_REMEDY}, or another attn_implementation"
        )
    return PackingCheck(
        error=errors[worst],
        tolerance=tolerance,
        num_samples=len(rows),
        num_text_probes=probes["text"],
        num_image_probes=probes["images"],
    )


def _changes(
    packed: dict[str, Any], alone: Sequence[dict[str, Any]], lengths: Sequence[int], marks: Sequence[int]
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Copies of the packed microbatch in which the text, or the images, of one sample are changed."""
    import torch

    pixels = {
        key: value
        for key, value in packed.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1 and key != "attention_mask"
    }
    row = packed["input_ids"][0]
    is_text = ~torch.isin(row, torch.tensor(marks, dtype=row.dtype))
    if "labels" in packed:
        is_text &= packed["labels"][0] != IGNORE  # what is learned is text, and not a marker of the template
    known = row[is_text].unique()
    start = 0
    for sample, length in enumerate(lengths):
        where = is_text.clone()
        where[:start] = where[start + length :] = False
        start += length
        if len(known) < 2 or not where.any():
            continue
        # Another of the text ids that the microbatch has: never one that stands for an image.
        old = row[where]
        ids = row.clone()
        ids[where] = known[(torch.searchsorted(known, old) + 1) % len(known)]
        yield sample, "text", {**packed, "input_ids": ids[None]}
    before = dict.fromkeys(pixels, 0)
    for sample, batch in enumerate(alone):
        changed = {}
        for key, value in pixels.items():
            count = batch[key].shape[0] if key in batch and len(batch["input_ids"]) == 1 else 0
            if count:
                changed[key] = value.clone()
                # Negation keeps tiles of zeros, which encoders drop, and moves all others.
                changed[key][before[key] : before[key] + count] *= -1
                before[key] += count
        if changed:
            yield sample, "images", {**packed, **changed}
    for key, value in pixels.items():
        if before[key] != value.shape[0] and sum(lengths) == packed["input_ids"].shape[1]:
            raise ModelError(
                f"{key} has {value.shape[0]} entries for the microbatch but {before[key]} for its samples one by one, "
                f"so those of a sample cannot be found. {_REMEDY}"
            )


def _logits(model: Any, batch: Mapping[str, Any]) -> Any:
    """Logits `(tokens, vocabulary)` of a microbatch of one row; of all rows where it has several."""
    logits = _forward(model, batch)
    return logits[0]


def _forward(model: Any, batch: Mapping[str, Any]) -> Any:
    parameter = next(model.parameters())
    given = {key: value for key, value in batch.items() if key != "labels"}
    return model(**_to(given, parameter.device, parameter.dtype)).logits


def _to(value: Any, device: Any, dtype: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _to(item, device, dtype) for key, item in value.items()}
    if hasattr(value, "is_floating_point"):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    return value


def _tolerance(model: Any, padded: Mapping[str, Any], expected: Sequence[Any]) -> float:
    import torch

    dtype = expected[0].dtype
    fixed = _TOLERANCE.get(str(dtype).removeprefix("torch."))
    if fixed is not None:
        return fixed
    rows = _forward(model, padded)
    noise = max(
        _difference(row[mask.bool()], alone)
        for row, mask, alone in zip(rows, padded["attention_mask"], expected, strict=False)  # a dummy has no row
    )
    return max(_HALF_TOLERANCE_EPS * torch.finfo(dtype).eps, _HALF_TOLERANCE_NOISE * noise)


def _difference(found: Any, expected: Any) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max() / expected.abs().max())


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No gradients, no dropout; every module's mode is put back."""
    import torch

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
