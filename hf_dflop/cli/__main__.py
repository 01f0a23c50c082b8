"""`python -m hf_dflop.cli`, the same as `hf-dflop`."""

from hf_dflop.cli.app import main

main()
