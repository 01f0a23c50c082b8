"""Turns shapes into seconds per module: the cost that balancing and planning minimise.

In: a `ModelSpec` and FLOP rates, assumed (`CostModel.analytic`) or fitted to measured microbatches
(`CostModel.fit`), or curves measured part by part (`CostModel.from_profile`). Out: float64 seconds per sample, row or
microbatch.

Assumptions: costs of samples add up. So a term runs at one rate whatever the size of the microbatch (kernels are
slower on small ones; the overhead takes up part of it), measured curves are used as a line through their upper three
quarters in tokens, and in full in the length of each sequence; and modules run one after the other. A padded
microbatch pays for every row as if it were its longest; the encoder never pads across samples.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.cost.fit import RATE_TERMS, FitError, fit_rates
from hf_dflop.cost.flops import Trainable, encoder_counts, llm_terms, train_factors, vision_terms
from hf_dflop.cost.from_profile import DIRECTIONS, reached_flops_per_s, sample_curves
from hf_dflop.cost.measurement import Direction
from hf_dflop.cost.model_profile import ModelProfile
from hf_dflop.cost.rates import Observation, Rates
from hf_dflop.cost.spec import ModelSpec
from hf_dflop.errors import ModelError
from hf_dflop.shapes import Shapes

__all__ = ["COST_SCHEMA_VERSION", "CostModel", "Observation", "Rates"]

COST_SCHEMA_VERSION = 1

_AUDIO_COUNTS = ("audio_chunks", "audio_frames", "audio_frames_sq")
FloatArray = npt.NDArray[np.float64]
Groups = Iterable[Sequence[int] | npt.NDArray[np.integer]]


def _terms(
    spec: ModelSpec,
    trainable: Trainable,
    checkpointing: bool,
    causal_factor: float,
    shapes: Shapes | None,
    tokens: npt.ArrayLike | None,
) -> dict[str, FloatArray]:
    """Training FLOPs summed into the terms that have a rate, for the samples' images and/or LLM rows."""
    factors = train_factors(spec, trainable, checkpointing=checkpointing)
    sums: dict[str, FloatArray] = {}
    if shapes is not None:
        vision = {name: flops * factors[name] for name, flops in vision_terms(spec, shapes).items()}
        sums["vision_attention"] = vision.pop("vision_attention") + vision.pop("audio_attention", 0.0)
        sums["vision_linear"] = np.sum(list(vision.values()), axis=0)
    if tokens is not None:
        llm = {
            name: flops * factors[name] for name, flops in llm_terms(spec, tokens, causal_factor=causal_factor).items()
        }
        sums["llm_attention"] = llm["llm_attention"]
        sums["llm_linear"] = llm["llm_linear"] + llm["llm_head"]
    return sums


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """Seconds per module from shapes.

    Example:
        >>> sub = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
        >>> spec = ModelSpec.from_config({"vision_config": sub | {"patch_size": 14},
        ...     "text_config": sub | {"hidden_act": "silu", "vocab_size": 32},
        ...     "projector_hidden_act": "gelu"})
        >>> cost = CostModel.analytic(spec, llm_flops_per_s=1e9)
        >>> cost.llm_s([10, 20]).shape, CostModel.from_json(cost.to_json()) == cost
        ((2,), True)
    """

    spec: ModelSpec
    rates: Rates
    trainable: Trainable = field(default_factory=Trainable)
    checkpointing: bool = False
    causal_factor: float = 0.5
    """Share of the (query, key) pairs that the LLM's attention kernel computes, see `llm_terms`."""
    per_microbatch_s: float = 0.0
    """Seconds of every microbatch whatever its samples (launches, communication)."""
    fit_error: FitError | None = None
    """How far the fit was off on held-out observations; None for an analytic model."""
    profile: ModelProfile | None = None
    """What was measured part by part; its curves are then used, and rates are not."""

    def __post_init__(self) -> None:
        if not (np.isfinite(self.per_microbatch_s) and self.per_microbatch_s >= 0):
            raise ModelError(f"per_microbatch_s is {self.per_microbatch_s}; it must be >= 0 and finite.")
        if not 0 < self.causal_factor <= 1:
            raise ModelError(
                f"causal_factor is {self.causal_factor}; it must lie in (0, 1]: 0.5 (flash), 1.0 (dense)."
            )

    @classmethod
    def analytic(
        cls,
        spec: ModelSpec,
        *,
        vision_flops_per_s: float = 1e12,
        llm_flops_per_s: float = 1e12,
        trainable: Trainable | None = None,
        checkpointing: bool = False,
        causal_factor: float = 0.5,
        per_microbatch_s: float = 0.0,
    ) -> "CostModel":
        """A cost model from FLOPs alone, before anything was measured.

        With the default rates, seconds are in an arbitrary scale: only their ratios (between samples, and
        between the modules as far as both run equally fast) hold.

        Raises:
            ModelError: a rate is not positive, or `causal_factor` is not in (0, 1].
        """
        rates = Rates(
            vision_linear=vision_flops_per_s,
            vision_attention=vision_flops_per_s,
            llm_linear=llm_flops_per_s,
            llm_attention=llm_flops_per_s,
        )
        return cls(
            spec=spec,
            rates=rates,
            trainable=trainable or Trainable(),
            checkpointing=checkpointing,
            causal_factor=causal_factor,
            per_microbatch_s=per_microbatch_s,
        )

    @classmethod
    def fit(
        cls,
        spec: ModelSpec,
        observations: Sequence[Observation],
        *,
        trainable: Trainable | None = None,
        checkpointing: bool = False,
        causal_factor: float = 0.5,
        hold_out_every: int = 5,
    ) -> "CostModel":
        """Fit the rates and the overhead to measured microbatches.

        Args:
            spec (`ModelSpec`): the model that was measured.
            observations (sequence of `Observation`):
                Microbatches, warm-up left out; 10 to 16 that differ in images and in text length are enough.
                Where they cannot tell terms apart (few of them, tiles of one size, no images), those terms
                share a rate, see `fit_error.merged`.
            trainable (`Trainable`), checkpointing (`bool`), causal_factor (`float`): as in the measured run.
            hold_out_every (`int`, defaults to 5):
                Observations number k-1, 2k-1, ... are not used in the fit; the error is reported on them.

        Returns:
            `CostModel`: with rates in FLOP/s, `per_microbatch_s` and `fit_error`.

        Raises:
            ModelError: fewer than 4 observations to fit or none held out, or seconds that do not grow with
            FLOPs.
        """
        held = [i for i in range(len(observations)) if hold_out_every > 1 and i % hold_out_every == hold_out_every - 1]
        used = sorted(set(range(len(observations))) - set(held))
        if len(used) < 4 or not held:
            raise ModelError(
                f"{len(observations)} observations with hold_out_every={hold_out_every} leave {len(used)} to fit and "
                f"{len(held)} to check; at least 4 and 1 are needed. Measure more microbatches (10 to 16)."
            )
        draft = cls.analytic(spec, trainable=trainable, checkpointing=checkpointing, causal_factor=causal_factor)
        flops = np.stack([draft._microbatch_flops(observed.shapes, observed.padded) for observed in observations])
        seconds = np.asarray([observed.seconds for observed in observations], dtype=np.float64)
        overhead, rates, merged = fit_rates(flops[used], seconds[used])
        predicted = overhead + flops[held] @ np.asarray([1.0 / rates[name] for name in RATE_TERMS])
        errors = np.abs(predicted - seconds[held]) / seconds[held]
        return replace(
            draft,
            rates=Rates(**rates),
            per_microbatch_s=overhead,
            fit_error=FitError(
                median=float(np.median(errors)),
                p95=float(np.percentile(errors, 95)),
                num_fitted=len(used),
                num_held_out=len(held),
                merged=merged,
            ),
        )

    @classmethod
    def from_profile(
        cls, profile: ModelProfile, *, trainable: Trainable | None = None, checkpointing: bool = False
    ) -> "CostModel":
        """The cost model of a model that `hf-dflop measure` measured.

        Args:
            profile (`ModelProfile`): what was measured.
            trainable (`Trainable`), checkpointing (`bool`):
                How the run trains. Settings that were not measured are scaled from those that were, by their FLOPs.

        Returns:
            `CostModel`: with curves, `per_microbatch_s`, and the held-out error of the profile as `fit_error`.

        Raises:
            ModelError: a module was not measured in any setting.
        """
        train = trainable or Trainable()
        curves = sample_curves(profile, train, checkpointing)
        rate = reached_flops_per_s(profile)
        return cls(
            spec=profile.spec,
            rates=Rates(vision_linear=rate, vision_attention=rate, llm_linear=rate, llm_attention=rate),
            trainable=train,
            checkpointing=checkpointing,
            per_microbatch_s=sum(base for base, _ in curves.values()),
            fit_error=profile.error,
            profile=profile,
        )

    def measured_s(self, module: str, direction: Direction, tokens: npt.ArrayLike, pairs: npt.ArrayLike) -> FloatArray:
        """Measured seconds of samples, without the overhead; only with a `profile`.

        Args:
            module (`str`): `vision` (with the connector), `llm` (its layers) or `llm_head`.
            direction (`str`): `forward`, or `backward` with recomputation.
            tokens, pairs (`(num_samples,)`): positions, and the sum over the sample's sequences of length².

        Raises:
            ModelError: the cost model has no profile.
        """
        if self.profile is None:
            raise ModelError("the cost model was not measured part by part; build it with CostModel.from_profile.")
        return sample_curves(self.profile, self.trainable, self.checkpointing)[module, direction][1].at(tokens, pairs)

    def _terms(self, shapes: Shapes | None, tokens: npt.ArrayLike | None) -> dict[str, FloatArray]:
        return _terms(self.spec, self.trainable, self.checkpointing, self.causal_factor, shapes, tokens)

    def _microbatch_flops(self, shapes: Shapes, padded: bool) -> FloatArray:
        """FLOPs of one microbatch by term, `(4,)` in the order of `RATE_TERMS`."""
        tokens = shapes.llm_tokens
        if padded and tokens.size:
            tokens = np.full_like(tokens, tokens.max())
        terms = self._terms(shapes, tokens)
        return np.asarray([float(terms[name].sum()) for name in RATE_TERMS])

    def vision_s(self, shapes: Shapes) -> FloatArray:
        """Seconds of encoders and connector for each sample, `(num_samples,)`; sounds are encoded too.

        Raises:
            ModelError: there are sounds, and the spec has no audio encoder.
        """
        if self.profile is not None:
            counts = encoder_counts(self.spec, shapes)
            measured = np.sum([self.measured_s("vision", way, *counts) for way in DIRECTIONS], axis=0)
            return measured + self._sounds_s(shapes) if shapes.num_audios.any() else measured
        terms = self._terms(shapes, None)
        return (
            terms["vision_linear"] / self.rates.vision_linear + terms["vision_attention"] / self.rates.vision_attention
        )

    def _sounds_s(self, shapes: Shapes) -> FloatArray:
        """Sounds are not measured part by part: their FLOPs, at the rate that the measured parts reach."""
        silent = replace(shapes, **{name: 0 * getattr(shapes, name) for name in ("num_audios", *_AUDIO_COUNTS)})
        with_sounds, without = (self._terms(counted, None) for counted in (shapes, silent))
        flops = sum(with_sounds[name] - without[name] for name in ("vision_linear", "vision_attention"))
        return np.asarray(flops / self.rates.vision_linear)

    def llm_s(self, tokens: Shapes | npt.ArrayLike) -> FloatArray:
        """Seconds of the LLM for rows of the given lengths, `(num_rows,)`; never less for a longer row.

        Args:
            tokens (`Shapes` or `(num_rows,)` of int): samples, or row lengths with their padding.
        """
        lengths = tokens.llm_tokens if isinstance(tokens, Shapes) else tokens
        if self.profile is not None:
            squares = np.asarray(lengths, dtype=np.float64) ** 2
            parts = [(module, way) for module in ("llm", "llm_head") for way in DIRECTIONS]
            return np.sum([self.measured_s(*part, lengths, squares) for part in parts], axis=0)
        terms = self._terms(None, lengths)
        return terms["llm_linear"] / self.rates.llm_linear + terms["llm_attention"] / self.rates.llm_attention

    def vision_work(self, shapes: Shapes) -> FloatArray:
        """What the rates of a sample's images apply to, `(num_samples, 2)`: weights, attention.

        FLOPs; of a measured model, which has curves, its seconds × the rate, all in the first column.
        """
        if self.profile is not None:
            return np.outer(self.vision_s(shapes) * self.rates.vision_linear, [1.0, 0.0])
        terms = self._terms(shapes, None)
        return np.column_stack([terms["vision_linear"], terms["vision_attention"]])

    def llm_work(self, tokens: npt.ArrayLike) -> FloatArray:
        """The same of LLM rows of the given lengths, `(num_rows, 2)`."""
        if self.profile is not None:
            return np.outer(self.llm_s(tokens) * self.rates.llm_linear, [1.0, 0.0])
        terms = self._terms(None, tokens)
        return np.column_stack([terms["llm_linear"], terms["llm_attention"]])

    def sample_seconds(self, shapes: Shapes) -> FloatArray:
        """Seconds of each sample alone and unpadded, `(num_samples, 2)`: vision, LLM; without the
        overhead."""
        return np.column_stack([self.vision_s(shapes), self.llm_s(shapes)])

    def microbatch_module_seconds(self, shapes: Shapes, groups: Groups, *, padded: bool) -> FloatArray:
        """Seconds of each microbatch by module, `(num_groups, 2)`: vision, LLM; without the overhead.

        Args:
            shapes (`Shapes`): samples.
            groups: for each microbatch, the indices of its samples in `shapes`; an empty one costs 0.
            padded (`bool`): rows are padded to the longest of the microbatch, or packed without padding.
        """
        vision = self.vision_s(shapes)
        tokens = shapes.llm_tokens
        alone = self.llm_s(tokens)
        indices = [np.asarray(group, dtype=np.int64) for group in groups]
        seconds = np.zeros((len(indices), 2))
        seconds[:, 0] = [vision[group].sum() for group in indices]
        if padded:  # cost grows with length, so the longest row is the dearest
            seconds[:, 1] = [group.size * alone[group].max() if group.size else 0.0 for group in indices]
        else:
            seconds[:, 1] = [alone[group].sum() for group in indices]
        return seconds

    def microbatch_seconds(self, shapes: Shapes, groups: Groups, *, padded: bool) -> FloatArray:
        """Seconds of each microbatch, `(num_groups,)`: both modules and `per_microbatch_s` each.

        Takes what `microbatch_module_seconds` does.
        """
        return self.microbatch_module_seconds(shapes, groups, padded=padded).sum(axis=1) + self.per_microbatch_s

    @property
    def version(self) -> str:
        """Hash of everything that the seconds depend on: equal versions give equal assignments."""
        content = self.to_dict()
        del content["fit_error"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """The model as plain JSON types, with the schema version."""
        return {
            "schema_version": COST_SCHEMA_VERSION,
            "spec": self.spec.to_dict(),
            "rates": asdict(self.rates),
            "trainable": asdict(self.trainable),
            "checkpointing": self.checkpointing,
            "causal_factor": self.causal_factor,
            "per_microbatch_s": self.per_microbatch_s,
            "fit_error": asdict(self.fit_error) if self.fit_error else None,
            **({"profile": self.profile.to_dict()} if self.profile else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "CostModel":
        """Inverse of `to_dict`.

        Raises:
            ModelError: the schema version is another one, or a field is missing or unknown.
        """
        fields = dict(data)
        version = fields.pop("schema_version", None)
        if version != COST_SCHEMA_VERSION:
            raise ModelError(
                f"cost model has schema version {version!r}; hf_dflop here reads {COST_SCHEMA_VERSION}. "
                "Build it again with CostModel.analytic or CostModel.fit."
            )
        try:
            fields["spec"] = ModelSpec.from_dict(fields["spec"])
            fields["rates"] = Rates(**fields["rates"])
            fields["trainable"] = Trainable(**fields["trainable"])
            if fields.get("fit_error") is not None:
                fields["fit_error"] = FitError(**fields["fit_error"])
            if fields.get("profile") is not None:
                fields["profile"] = ModelProfile.from_dict(fields["profile"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ModelError(
                f"cost model is not readable ({error}). Build it again with CostModel.analytic or CostModel.fit."
            ) from error

    def to_json(self) -> str:
        """The model as a JSON string."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "CostModel":
        """Inverse of `to_json`; raises what `from_dict` raises."""
        return cls.from_dict(json.loads(text))

    def save(self, path: str | Path) -> None:
        """Write the model as JSON to `path`."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "CostModel":
        """Read a model that `save` wrote, or the `ModelProfile` that `hf-dflop measure` wrote (everything trained).

        Raises what `from_dict` raises.
        """
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(data, dict) and "measurements" in data:
            return cls.from_profile(ModelProfile.from_dict(data))
        return cls.from_dict(data)
