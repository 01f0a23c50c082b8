"""Topic: what each sampler would bring from 8 to 4,096 ranks, simulated with the library's own cost and balance code."""
