"""From dataset rows to the microbatches of each rank.

collate.py        rows → padded tensors, checked against the shape columns
packed.py         rows → one row without padding
structure.py      what of a model decides how samples can share a row
packing_check.py  does a model give joined samples the logits that they have alone?
sampler.py        stock grouping and shapes → the index lists of this rank
lookahead.py      the next results, computed in a thread
"""

from hf_dflop.data.collate import VisionLanguageCollator
from hf_dflop.data.packed import PackedCollator
from hf_dflop.data.packing_check import PackingCheck, check_packing

__all__ = ["PackedCollator", "PackingCheck", "VisionLanguageCollator", "check_packing"]
