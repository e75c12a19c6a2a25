"""The full figures: `python -m tests.hostile --decoders 100000 --sockets 10000 --crowd`."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from tests.hostile.decoders import all_decoders, run_decoders, table

_MIB = 1 << 20


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _decoders(messages: int, seed: int) -> bool:
    """All decoders; memory is compared with that after a twentieth of the messages."""
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        decoders = all_decoders(Path(folder))
        run_decoders(decoders, messages // 20, seed=seed + 1)
        before, start = process.memory_info().rss, time.monotonic()
        outcomes = run_decoders(decoders, messages, seed, measure_every=20)
        after, seconds = process.memory_info().rss, time.monotonic() - start
    _say(table(outcomes))
    _say(
        f"{messages} messages in {seconds:.0f} s; resident memory {before / _MIB:.1f} MiB before, "
        f"{after / _MIB:.1f} MiB after"
    )
    for name, outcome in outcomes.items():
        for fault in outcome.faults[:3]:
            _say(f"{name}: {fault}")
    slowest = max(outcomes.values(), key=lambda outcome: outcome.slowest_seconds)
    _say(f"slowest: {slowest.slowest_seed}, {slowest.slowest_seconds * 1000:.1f} ms")
    return not any(outcome.faults for outcome in outcomes.values())


def main() -> int:
    """Run what is asked for; 0 when all of it was withstood."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--decoders", type=int, default=0, help="messages to the decoders")
    parser.add_argument("--sockets", type=int, default=0, help="messages to each live service")
    parser.add_argument("--rest", type=int, default=0, help="requests to each REST operation")
    parser.add_argument("--crowd", action="store_true", help="64 clients of which 8 are hostile")
    parser.add_argument("--seed", type=int, default=0, help="names all messages")
    options = parser.parse_args()
    torch.set_num_threads(1)
    withstood = True
    if options.decoders:
        withstood &= _decoders(options.decoders, options.seed)
    if options.sockets:
        from tests.hostile.live import report_sockets

        withstood &= report_sockets(options.sockets, options.seed)
    if options.rest:
        from tests.hostile.rest import report_rest

        withstood &= report_rest(options.rest)
    if options.crowd:
        from tests.hostile.crowd import report_crowd

        withstood &= report_crowd()
    return 0 if withstood else 1


if __name__ == "__main__":
    sys.exit(main())
