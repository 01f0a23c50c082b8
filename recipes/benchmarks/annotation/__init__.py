"""How fast rows are counted, and how much memory that takes: `python -m recipes.benchmarks.annotation`."""
