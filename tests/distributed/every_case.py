"""Whether scripts run every case (`make test-all`), or those alone that have each condition once (`make test`)."""

import os

EVERY_CASE = os.environ.get("HF_DFLOP_EVERY_CASE") == "1"
