"""Data-aware balancing of vision-language model training for Hugging Face Trainer, TRL and Accelerate.

    profile_dataset   what each sample of a dataset costs the vision encoder and the LLM, without decoding pixels
    DflopCallback     pass it to `Trainer`, and every rank finishes its step together
    BalancedStream    balanced microbatches from a stream, for a DataLoader of your own
    PackedCollator    joins the samples of a microbatch into one row without padding
    attend_by_sample  such a row costs what its samples cost, also without FlashAttention
    measure_model     what a model's parts take on this machine
    PipelineModel     a stock model whose encoder and LLM run on their own ranks, in stages
    DflopTrainer      `Trainer` over a PipelineModel
    prepare           the same in an Accelerate loop of your own
    CostModel         shapes → seconds per module
    simulate          what a plan's steps take on a dataset, and why ranks wait
    balance.assign    the partitioner that the callback runs

Importing this module imports neither torch nor transformers: every public name is loaded when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_EXPORTS = {
    "BalancedStream": "hf_dflop.data",
    "Cluster": "hf_dflop.plan.cluster",
    "CostModel": "hf_dflop.cost",
    "DatasetProfile": "hf_dflop.profile",
    "DflopCallback": "hf_dflop.integrations",
    "DflopError": "hf_dflop.errors",
    "DflopTrainer": "hf_dflop.integrations",
    "ModelProfile": "hf_dflop.cost",
    "ModelSpec": "hf_dflop.cost",
    "Network": "hf_dflop.plan.network",
    "PackedCollator": "hf_dflop.data",
    "Plan": "hf_dflop.plan.plan",
    "PipelineModel": "hf_dflop.pipeline",
    "PipelineTrace": "hf_dflop.pipeline",
    "Shapes": "hf_dflop.shapes",
    "VisionLanguageCollator": "hf_dflop.data",
    "attend_by_sample": "hf_dflop.data",
    "check_packing": "hf_dflop.data",
    "measure_model": "hf_dflop.profile.measure",
    "make_plan": "hf_dflop.plan.make_plan",
    "prepare": "hf_dflop.integrations",
    "profile_dataset": "hf_dflop.profile",
    "simulate": "hf_dflop.plan.simulation",
}
_MODULES = ("balance", "cost", "errors", "shapes")

__all__ = [*sorted(_EXPORTS), "__version__"]

if TYPE_CHECKING:
    from hf_dflop.cost import CostModel, ModelProfile, ModelSpec
    from hf_dflop.data import BalancedStream, PackedCollator, VisionLanguageCollator, attend_by_sample, check_packing
    from hf_dflop.errors import DflopError
    from hf_dflop.integrations import DflopCallback, DflopTrainer, prepare
    from hf_dflop.pipeline import PipelineModel, PipelineTrace
    from hf_dflop.plan.cluster import Cluster
    from hf_dflop.plan.make_plan import make_plan
    from hf_dflop.plan.network import Network
    from hf_dflop.plan.plan import Plan
    from hf_dflop.plan.simulation import simulate
    from hf_dflop.profile import DatasetProfile, profile_dataset
    from hf_dflop.profile.measure import measure_model
    from hf_dflop.shapes import Shapes


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return import_module(f"hf_dflop.{name}")
    raise AttributeError(f"module 'hf_dflop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_MODULES]
