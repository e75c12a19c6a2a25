"""Seeds for every random draw, so that any round can be replayed."""

import hashlib


def derive_seed(run_seed: int, *parts: str | int) -> int:
    """Return a 63-bit seed that depends on the run's seed and on what the draw is for.

    `parts` names the draw: role, client id, round, micro-batch, tensor name. The same
    arguments give the same seed on every machine and Python version.
    """
    name = "\x1f".join([str(run_seed), *map(str, parts)])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
