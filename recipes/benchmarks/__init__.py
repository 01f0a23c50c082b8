"""Benchmarks: hf_dflop beside what one would use instead, topic by topic, in one invocation each.

`python -m recipes.benchmarks.<topic>` measures a topic and leaves a dated JSON in `<topic>/results/`;
`python -m recipes.benchmarks page` makes `docs/benchmarks.md` and its figures from the newest of them.
"""
