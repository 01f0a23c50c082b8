"""Topic: the pipeline beside its prediction, torch's own engine, padding to the longest, DDP and FSDP2."""
