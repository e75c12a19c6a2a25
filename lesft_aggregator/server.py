"""Puts the aggregator together and runs it: store, rounds, gRPC service, control API."""

import asyncio
import logging
import signal
from collections.abc import Callable

from lesft.channel import bind, make_server, set_serving
from lesft.control import ControlServer, write_endpoints
from lesft.v1.aggregation_pb2_grpc import add_AggregationServiceServicer_to_server
from lesft_aggregator.control_api import make_app
from lesft_aggregator.metrics import Metrics
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
        self.rounds = Rounds(self._store, settings, self._metrics.published)
        self._metrics.version.set(self.rounds.version)
        app = make_app(self.rounds, self._store, settings, self._metrics)
        self._control = ControlServer(app, settings.insecure)
        self._grpc, self._health = make_server([SERVICE_NAME])
        service = AggregationService(self.rounds, self._store, settings, self._metrics)
        add_AggregationServiceServicer_to_server(service, self._grpc)

    async def start(self) -> dict[str, str]:
        """Listen, and leave the real addresses in endpoints.json; returns them by kind.

        Raises InvalidInput or Unreachable when an address cannot be used.
        """
        grpc_address = bind(self._grpc, self._settings.listen, self._settings.insecure)
        await self._grpc.start()
        await self.rounds.resume()
        await set_serving(self._health, [SERVICE_NAME])
        control_address = await self._control.start(self._settings.control)
        addresses = {"grpc": grpc_address, "control": control_address}
        write_endpoints(self._settings.state, addresses)
        return addresses

    async def stop(self, reason: str) -> None:
        """End all waiting calls with `reason`, then the services, then close the store."""
        await self._health.enter_graceful_shutdown()
        await self.rounds.stop(reason)
        await self._grpc.stop(GRACE_SECONDS)
        await self._control.stop()
        self._store.close()


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
        announce(f"ready: grpc {addresses['grpc']}, control http://{addresses['control']}")
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
