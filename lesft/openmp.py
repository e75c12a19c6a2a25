"""How the threads of torch's OpenMP wait for each other. Without torch, which reads it as it loads.

Decision 0015 has what was measured.
"""

import os

_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}


def sleep_soon() -> None:
    """Have threads that wait go to sleep after some 10 microseconds, unless the user says how long.

    By itself GNU's OpenMP lets them spin for milliseconds, on cores that other services on the same
    machine could have. At once would be too soon: in a step they wait tens of thousands of times.
    """
    if _ENVIRONMENT.keys().isdisjoint(os.environ):
        os.environ.update(_ENVIRONMENT)
