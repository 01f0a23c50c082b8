"""Balance: which samples make up which microbatch, so that ranks finish together.

`assign` composes the microbatches of a step under the objective that fits the run; `partition` spreads samples with
several costs over buckets; `lower_bound` says how far from the best a result can be at most. Numpy and numba only.
"""

from hf_dflop.balance.assign import assign
from hf_dflop.balance.assignment import Assignment
from hf_dflop.balance.bound import lower_bound
from hf_dflop.balance.exact import exact_partition
from hf_dflop.balance.objective import OBJECTIVES
from hf_dflop.balance.partition import Partition, partition
from hf_dflop.balance.warmup import warm_up
from hf_dflop.balance.window import pair_giants

__all__ = [
    "OBJECTIVES",
    "Assignment",
    "Partition",
    "assign",
    "exact_partition",
    "lower_bound",
    "pair_giants",
    "partition",
    "warm_up",
]
