"""Topic: balancing in training, two processes, every sampler padded and packed."""
