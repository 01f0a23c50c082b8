"""The command line: `hf-dflop COMMAND`.

    profile   what each sample of a dataset costs a model
    merge     the profiles of all parts of a dataset → one
    report    who waited for whom in a recorded run

A user's mistake ends with exit code 2 and one line on stderr; with `--json`, stdout holds one JSON object and
nothing else.
"""

from hf_dflop.cli.app import app, main

__all__ = ["app", "main"]
