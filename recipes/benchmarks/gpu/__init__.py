"""Topic: module curves, samplers replayed rank by rank, and the engine, on one GPU."""
