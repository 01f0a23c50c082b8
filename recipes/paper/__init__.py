"""The settings of the DFLOP paper, planned and simulated: `python -m recipes.paper`."""
