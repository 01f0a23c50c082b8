"""What each sample of a dataset is in counts, found without decoding a pixel.

tokens.py    image size → tiles, patches, LLM tokens, for one processor
annotate.py  rows → the shape columns; the function that `datasets.map` runs
verify.py    the same counts, taken from a really processed row
bad_rows.py  what happens to rows that are not usable
source.py    Hub ids, folders, files and processors → objects
stream.py    streams: annotated lazily, profiled on some rows
dataset.py   `profile_dataset`: load, verify, annotate, cache
counts*.py   counts of all rows, chunk by chunk, in a file that is mapped into memory
join.py      counts → columns of the dataset, without copying its rows
origin.py    fingerprint of a processor and policy, kept with the annotated dataset
subset.py    which sub-dataset a row comes from
report.py    `DatasetProfile`: totals, quantiles, figures
distinct.py  quantiles of counts without a copy of them
merge.py     the profiles of all parts of a dataset → the profile of the whole
waiting.py   how long ranks would wait for each other
figures.py   the figures of the page
page.py      one self-contained HTML page
measure*.py  what a model's parts take on this machine: `measure_model`, its grid, groups, shards, clock and bar
"""

from hf_dflop.profile.bad_rows import RowError
from hf_dflop.profile.dataset import profile_dataset
from hf_dflop.profile.origin import annotation_of, processor_fingerprint
from hf_dflop.profile.report import DatasetProfile
from hf_dflop.profile.tokens import TokenCounter

__all__ = [
    "DatasetProfile",
    "RowError",
    "TokenCounter",
    "annotation_of",
    "processor_fingerprint",
    "profile_dataset",
]
