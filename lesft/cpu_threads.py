"""Which threads of a process compute on many cores: one of them, and all others on one.

torch's OpenMP gives every thread that computes a team of its own. Once the teams of a process have
more threads than there are cores, none of them waits for its next piece of work with its eyes open
any more: they go to sleep after each piece, of which a training step has tens of thousands, and a
step takes a fifth longer. Decoding a message in a thread beside the model was enough for that.
"""

import threading
from functools import cache

import torch


def compute_on_this_thread(num_threads: int) -> None:
    """Let torch compute on so many cores in the calling thread, 0: all, and on one in later ones.

    Threads that have computed already stay as they are.
    """
    _set(num_threads or _all_cores())
    # Setting a thread's number sets that of all later ones, too.
    others = threading.Thread(target=compute_on_one_core)
    others.start()
    others.join()


def compute_on_one_core() -> None:
    """Leave the cores to another thread of the process."""
    _all_cores()  # asked before it is changed
    _set(1)


@cache
def _all_cores() -> int:
    """What the process had first: the cores, OMP_NUM_THREADS, or what its program has set."""
    return torch.get_num_threads()


def _set(num_threads: int) -> None:
    torch.get_num_threads()  # the first call takes over the process's number, whatever was set here
    torch.set_num_threads(num_threads)
