"""The server's end of a measurement of the link: it answers with as many bytes as it is asked for.

All pacing is the client's; here are only the bounds. The bytes are random, so that nothing on the
way can make them fewer.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator

from lesft.errors import InvalidInput, TooLarge
from lesft.link_probe import MAX_PIECE_BYTES, MAX_PROBE_BYTES, MAX_PROBE_SECONDS, charge
from lesft.v1 import model_pb2

_NOISE = os.urandom(MAX_PIECE_BYTES)


async def echo(
    requests: AsyncIterator[model_pb2.MeasureLinkRequest], seconds: float = MAX_PROBE_SECONDS
) -> AsyncIterator[model_pb2.MeasureLinkResponse]:
    """Answers in order. Raises InvalidInput for too large a piece, TooLarge for too many."""
    moved, ends = 0, time.monotonic() + seconds
    while True:
        try:
            request = await asyncio.wait_for(anext(requests, None), ends - time.monotonic())
        except asyncio.TimeoutError:
            raise TooLarge(f"a measurement may last {seconds:g} s: begin another one") from None
        if request is None:
            return
        largest = max(len(request.payload), request.answer_bytes)
        if largest > MAX_PIECE_BYTES:
            raise InvalidInput(
                f"payload and answer_bytes must be at most {MAX_PIECE_BYTES} bytes, got {largest}"
            )
        moved += charge(len(request.payload), request.answer_bytes)
        if moved > MAX_PROBE_BYTES:
            raise TooLarge(
                f"a measurement may move {MAX_PROBE_BYTES} bytes, of which each message counts as "
                "16 KiB at least: begin another one"
            )
        yield model_pb2.MeasureLinkResponse(payload=_NOISE[: request.answer_bytes])
