"""From dataset rows to the microbatches of each rank.

collate.py        rows → padded tensors, checked against the shape columns
packed.py         rows → one row without padding
by_sample.py      attention sample by sample, where there is no varlen kernel
structure.py      what of a model decides how samples can share a row
packing_check.py  does a model give joined samples the logits that they have alone?
sampler.py        stock grouping and shapes → the index lists of this rank
stream.py         an annotated stream → the microbatches of this rank, and rows_of_stream.py, which reads it
place.py          where a run stands in an epoch
windows.py        steps with their giants paired
joined_rows.py    what a row costs where attention computes all pairs of its tokens
dummies.py        dummy images as samples of a step
lookahead.py      the next results, computed in a thread
"""

from hf_dflop.data.by_sample import attend_by_sample
from hf_dflop.data.collate import VisionLanguageCollator
from hf_dflop.data.packed import PackedCollator
from hf_dflop.data.packing_check import PackingCheck, check_packing
from hf_dflop.data.stream import BalancedStream

__all__ = [
    "BalancedStream",
    "PackedCollator",
    "PackingCheck",
    "VisionLanguageCollator",
    "attend_by_sample",
    "check_packing",
]
