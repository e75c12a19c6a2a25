"""The part `wan`: how much of a link, or of the devices at its ends, training makes use of.

A server and one client with a link between them, in the steady state: all that the link can move,
as plain sockets measure it, against what went through it, and the time in which each end computed.
Whatever is busiest is the bottleneck, and should be busy all the time. Nothing is averaged, so all
that crosses the link is micro-batches and their gradients. Each end has half of the threads, so
that they do not compute on each other's cores.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lesft_testbed.bench.jobs import start_service
from lesft_testbed.bench.part import Alternative, Bench, Figure, Values
from lesft_testbed.bench.phases import phase_seconds
from lesft_testbed.commands import client_command, client_name, server_command
from lesft_testbed.emulated_link import EmulatedLink, LinkShape
from lesft_testbed.link_calibration import MeasuredLink, calibrate
from lesft_testbed.processes import Processes
from lesft_testbed.settings import RunSettings
from lesft_testbed.watch import Watcher

_TARGET = 0.90
_WAN, _FAR, _LOOPBACK = "wan", "far", "no link"
_FAR_SHAPE = LinkShape(round_trip_ms=200, up_mbit=5, down_mbit=20)
_POLL_SECONDS = 0.1
_ROUNDS = 100_000
"""More than are measured: a run is ended in its midst, never at its end."""

_SERVER, _CLIENT = "server", client_name(0)

_SHARES = ("up_share", "down_share", "client_busy_share", "server_busy_share")
"""Of what could have been moved, and of the time."""

_CLIENT_PHASES = ("front_forward", "front_backward", "optimizer")
"""Those in which the client computes."""


def utilisation(values: Values) -> float:
    """Use of whatever is used most: one direction of the link, or the device at one end."""
    return max(values[_WAN][share] for share in _SHARES)


class Wan:
    """Link or device utilisation over an emulated link."""

    name = "wan"
    about = (
        "What of the link's bandwidth, or of the devices' time, training uses over an emulated "
        "link, over a farther one, and without one; one client."
    )
    depends_on = ("model", "data", "samples", "seed", "threads")
    figures = (
        Figure(
            "wan_utilisation",
            "bytes moved / what the link could move in that time, or device busy time / wall "
            "time, whichever is largest",
            utilisation,
            _TARGET,
            at_least=True,
        ),
    )
    is_exact = False

    @contextmanager
    def alternatives(self, bench: Bench) -> Iterator[Sequence[Alternative]]:
        """Two links, and none."""
        wan = bench.settings.wan.model_dump(include=set(LinkShape.model_fields))
        shapes = {_WAN: LinkShape(**wan), _FAR: _FAR_SHAPE, _LOOPBACK: None}
        yield [
            Alternative(name, partial(measure_run, bench, shape)) for name, shape in shapes.items()
        ]


def measure_run(bench: Bench, shape: LinkShape | None) -> dict[str, float]:
    """One run over a link of this shape. Raises RunStopped when a service fails."""
    run, wan = _run_settings(bench), bench.settings.wan
    with ExitStack() as stack:
        processes = stack.enter_context(Processes(Path(tempfile.mkdtemp(dir=bench.scratch))))
        watcher = Watcher(processes)
        stack.callback(watcher.close)
        command = server_command(run, bench.model, processes.state_of(_SERVER))
        address = start_service(processes, _SERVER, command)
        link, measured = None, None
        if shape is not None:
            link = EmulatedLink(address, shape)
            stack.callback(link.close)
            measured = calibrate(link, wan.calibration_seconds)
            link.retarget(address)
        reached = link.address if link else address
        state = processes.state_of(_CLIENT)
        processes.start(_CLIENT, client_command(run, bench.model, state, 0, reached, ""))
        first = _reading(processes, watcher, link, wan.skipped_rounds)
        last = _reading(processes, watcher, link, wan.skipped_rounds + wan.rounds)
    return figures_between(first, last, measured)


def _run_settings(bench: Bench) -> RunSettings:
    """Defaults but for these; unvalidated, so that no environment variable has a say."""
    settings, wan = bench.settings, bench.settings.wan
    threads = max(1, settings.num_threads // 2)
    return RunSettings.model_construct(
        run_id="wan",
        clients=1,
        aggregate=False,
        accumulation=wan.accumulation,
        rounds=_ROUNDS,
        aggregation_interval=_ROUNDS,  # a checkpoint would come at its end
        data=settings.data,
        samples=settings.samples,
        held_out=0,
        seed=settings.seed,
        cache=settings.cache,
        weights="local",
        device="auto",
        server_threads=threads,
        client_threads=threads,
    )


# ---------------------------------------------------------------------- what is read


@dataclass(frozen=True)
class Reading:
    """What has come together by one moment."""

    seconds: float
    rounds: int
    bytes_up: int
    """Over the link; as the client counts them where there is none."""
    bytes_down: int
    client_busy_seconds: float
    server_busy_seconds: float
    proxy_seconds: float


def figures_between(
    first: Reading, last: Reading, measured: MeasuredLink | None
) -> dict[str, float]:
    """What happened between two readings. Without a link nothing is known of its shares."""
    wall = last.seconds - first.seconds
    rounds = last.rounds - first.rounds
    up, down = last.bytes_up - first.bytes_up, last.bytes_down - first.bytes_down
    figures = {
        "client_busy_share": (last.client_busy_seconds - first.client_busy_seconds) / wall,
        "server_busy_share": (last.server_busy_seconds - first.server_busy_seconds) / wall,
        "round_seconds": wall / rounds,
        "up_mb_per_round": up / rounds / 1e6,
        "down_mb_per_round": down / rounds / 1e6,
    }
    if measured is None:
        return figures
    return {
        "up_share": up * 8e-6 / (measured.up_mbit * wall),
        "down_share": down * 8e-6 / (measured.down_mbit * wall),
        **figures,
        "proxy_cpu_share": (last.proxy_seconds - first.proxy_seconds) / wall,
        **{f"measured_{name}": value for name, value in asdict(measured).items()},
    }


def _reading(
    processes: Processes, watcher: Watcher, link: EmulatedLink | None, rounds: int
) -> Reading:
    """As soon as so many rounds are done."""
    client, server = processes.all[_CLIENT], processes.all[_SERVER]
    while True:
        processes.check()
        run: Mapping[str, Any] = watcher.get(server, "/v1/run") or {"rounds_done": 0}
        status = watcher.get(client, "/v1/status")
        if status and run["rounds_done"] >= rounds:
            break
        time.sleep(_POLL_SECONDS)
    now = time.monotonic()
    counts = link.counts() if link else None
    phases = phase_seconds(client.address("control"), "lesft_client_phase_seconds_total")
    return Reading(
        now,
        run["rounds_done"],
        counts.bytes_up if counts else status["bytes_up"],
        counts.bytes_down if counts else status["bytes_down"],
        sum(phases.get(phase, 0.0) for phase in _CLIENT_PHASES),
        phase_seconds(server.address("control"), "lesft_server_step_seconds_sum")["back"],
        link.cpu_seconds() if link else 0.0,
    )
