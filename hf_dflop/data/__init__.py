"""From dataset rows to the microbatches of each rank.

collate.py    rows → padded tensors, checked against the shape columns
sampler.py    stock grouping and shapes → the index lists of this rank
lookahead.py  the next results, computed in a thread
"""

from hf_dflop.data.collate import VisionLanguageCollator

__all__ = ["VisionLanguageCollator"]
