"""`lesft-client serve`: the endpoint as a process."""

import asyncio
import signal
import ssl
import sys

from lesft.control import ControlServer
from lesft_client.endpoint.api_key import read_api_key
from lesft_client.endpoint.app import Endpoint
from lesft_client.endpoint.asking import Defaults
from lesft_client.own_listener import listener_context
from lesft_client.settings import ServeSettings

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def serve(settings: ServeSettings) -> None:
    """Serve until SIGTERM or Ctrl-C, which end what is being written with an error that says so.

    Raises InvalidInput for an address that is open by accident or a key that cannot be read,
    Unreachable when the address cannot be listened on, and what opening the model raises.
    """
    # Before the model is loaded, which takes a while.
    tls = listener_context(settings, settings.listen)
    api_key = read_api_key(settings.api_key_file)
    asyncio.run(_serve(settings, api_key, tls))


async def _serve(settings: ServeSettings, api_key: str | None, tls: ssl.SSLContext | None) -> None:
    from lesft_client.open_model import open_model

    async with open_model(settings) as model:
        defaults = Defaults(settings.temperature, settings.max_tokens)
        endpoint = Endpoint(model, defaults, api_key)
        server = ControlServer(endpoint.app, settings.listener_insecure, tls)
        address = await server.start(settings.listen)
        url = f"{'http' if tls is None else 'https'}://{address}/v1"
        sys.stdout.write(f"ready: {url}  model {model.name}  (try: curl {url}/models)\n")
        sys.stdout.flush()
        await _signal_to_stop()
        endpoint.stop()
        await server.stop()


async def _signal_to_stop() -> None:
    """Wait for the first one; those after it have their ordinary meaning again."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stopping.set)
    await stopping.wait()
    for number in _SIGNALS:
        loop.remove_signal_handler(number)
