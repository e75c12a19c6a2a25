"""Which sample comes when: a data cursor that is a pure function of the run's seed and a position.

Shuffles are made from `random.Random(seed).random()` alone: that sequence is what Python promises
to keep for a seed from version to version; `shuffle`, `sample` and numpy's Generator may change.
So clients with different Pythons agree on their shares, and a run can be replayed after an upgrade.
"""

import random
from functools import lru_cache

from lesft.seeds import derive_seed


def permutation(seed: int, length: int) -> list[int]:
    """The numbers 0 to length - 1 in an order drawn from the seed."""
    draw = random.Random(seed).random
    keys = [draw() for _ in range(length)]
    return sorted(range(length), key=keys.__getitem__)


def sample_index(run_seed: int, client_id: str, position: int, num_samples: int) -> int:
    """The index of the sample that a client draws at a position.

    `position` counts the samples drawn since the run began, from 0. Each epoch, `num_samples`
    positions long, visits every sample once, in an order of its own.
    """
    epoch, offset = divmod(position, num_samples)
    return _epoch_order(run_seed, client_id, epoch, num_samples)[offset]


@lru_cache(maxsize=4)
def _epoch_order(run_seed: int, client_id: str, epoch: int, num_samples: int) -> list[int]:
    return permutation(derive_seed(run_seed, "order", client_id, epoch), num_samples)
