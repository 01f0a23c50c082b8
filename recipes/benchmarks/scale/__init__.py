"""Topic: what each sampler would bring from 8 to 4,096 ranks, simulated by the library's cost and balance code."""
