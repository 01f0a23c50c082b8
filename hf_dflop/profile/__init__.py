"""What each sample of a dataset is in counts, found without decoding a pixel.

tokens.py    image size → tiles, patches, LLM tokens, for one processor
annotate.py  rows → the shape columns; the function that `datasets.map` runs
verify.py    the same counts, taken from a really processed row
dataset.py   `profile_dataset`: load, verify, annotate, cache
origin.py    fingerprint of a processor and policy, kept with the annotated dataset
report.py    `DatasetProfile`: totals, quantiles, figures
"""

from hf_dflop.profile.dataset import profile_dataset
from hf_dflop.profile.origin import annotation_of, processor_fingerprint
from hf_dflop.profile.report import DatasetProfile
from hf_dflop.profile.tokens import TokenCounter

__all__ = ["DatasetProfile", "TokenCounter", "annotation_of", "processor_fingerprint", "profile_dataset"]
