"""Topic: how good and how fast the partition is, beside a solver and the packages one would reach for."""
