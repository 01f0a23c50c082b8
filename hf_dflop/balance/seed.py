"""The state that a seeded search starts from."""

__all__ = ["seed_state"]


def seed_state(seed: int, turn: int = 0) -> int:
    """An odd number below 2**62 (xorshift must not start at 0), far apart for neighbouring seeds and turns."""
    mixed = (int(seed) + 1) * 0x9E3779B97F4A7C15 + (turn + 1) * 0xBF58476D1CE4E5B9
    mixed ^= mixed >> 31
    return (mixed * 0x94D049BB133111EB) % 2**62 | 1
