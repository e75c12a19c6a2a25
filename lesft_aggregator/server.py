"""Puts the aggregator together and runs it: store, rounds, gRPC service, control API."""

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Mapping

from lesft.call_limits import CallLimiter
from lesft.channel import set_serving
from lesft.control import write_endpoints
from lesft.identity.expiry import show_expiry
from lesft.identity.listeners import bind_grpc, control_server, endpoints_of, grpc_server
from lesft.identity.security import Security
from lesft.live import LivePage
from lesft.logs import note_process
from lesft.v1.aggregation_pb2_grpc import add_AggregationServiceServicer_to_server
from lesft_aggregator.control_api import make_app
from lesft_aggregator.metrics import Metrics
from lesft_aggregator.norms import AdapterNorms
from lesft_aggregator.rounds import Rounds
from lesft_aggregator.service import SERVICE_NAME, AggregationService
from lesft_aggregator.settings import AggregatorSettings
from lesft_aggregator.store import Store

log = logging.getLogger(__name__)

GRACE_SECONDS = 5
"""How long calls under way may go on once the aggregator was told to stop."""


class Aggregator:
    """One running aggregator. Make it and use it on one event loop."""

    def __init__(self, settings: AggregatorSettings) -> None:
        """Opens the state folder. Raises InvalidInput; see `Store`."""
        self._settings = settings
        self._metrics = Metrics()
        self._store = Store(settings.state, settings.run_id, settings.fresh)
        norms = AdapterNorms(settings.max_adapter_norm, settings.norm_policy, self._metrics.limits)
        self.rounds = Rounds(self._store, settings, self._metrics.published, norms)
        self._metrics.watch(self.rounds, self._store, settings)
        note_process(run=settings.run_id)
        self._live = LivePage()
        self._live.start()
        app = make_app(self.rounds, self._store, settings, self._metrics, self._live)
        self._security = Security.of(settings, "aggregator")
        self._control = control_server(
            app, settings, self._security, self._metrics.refused_requests.around
        )
        self._grpc, self._health = grpc_server(
            [SERVICE_NAME],
            self._security,
            self._metrics.refused_calls.count,
            [CallLimiter(settings, self._metrics.limits)],
        )
        service = AggregationService(self.rounds, self._store, settings, self._metrics)
        add_AggregationServiceServicer_to_server(service, self._grpc)

    async def start(self) -> Mapping[str, str]:
        """Listen, and leave the real addresses in endpoints.json; returns what is in there.

        Raises InvalidInput or Unreachable when an address cannot be used.
        """
        grpc_address = bind_grpc(self._grpc, self._settings, self._security)
        await self._grpc.start()
        security = self._security
        if security is not None:
            security.start()
            show_expiry(self._metrics.registry, "aggregator", lambda: security.expires)
        await self.rounds.resume()
        await set_serving(self._health, [SERVICE_NAME])
        control_address = await self._control.start(self._settings.control)
        endpoints = endpoints_of(
            "aggregator", self._settings, security, grpc_address, control_address
        )
        write_endpoints(self._settings.state, endpoints)
        return endpoints

    async def stop(self, reason: str) -> None:
        """End all waiting calls with `reason`, then the services, then close the store."""
        await self._health.enter_graceful_shutdown()
        await self.rounds.stop(reason)
        await self._grpc.stop(GRACE_SECONDS)
        self._live.stop()
        await self._control.stop()
        if self._security is not None:
            await self._security.stop()
        self._store.close()


def run(settings: AggregatorSettings) -> None:
    """The command: run until SIGTERM or SIGINT. Raises LesftError when it cannot run on."""
    asyncio.run(serve(settings, _announce))


def _announce(line: str) -> None:
    sys.stdout.write(f"lesft-aggregator {line}\n")
    sys.stdout.flush()


async def serve(settings: AggregatorSettings, announce: Callable[[str], None]) -> None:
    """Run until SIGTERM or SIGINT; `announce` gets one line when clients may come.

    Raises LesftError when the aggregator cannot start or cannot go on.
    """
    aggregator = Aggregator(settings)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        addresses = await aggregator.start()
        scheme = "http" if addresses["tls"] == "off" else "https"
        announce(f"ready: grpc {addresses['grpc']}, control {scheme}://{addresses['control']}")
        ended = asyncio.create_task(aggregator.rounds.wait_until_ended())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
        failure = aggregator.rounds.ended
    finally:
        await aggregator.stop("the aggregator is stopping")
    stopped.cancel()
    if failure is not None:
        raise failure
    log.info("stopped")
