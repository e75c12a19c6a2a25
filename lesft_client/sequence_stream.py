"""The wire of split decoding: one connection for all sequences, one stream for each of them."""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TypeVar

import grpc

from lesft.bundle import BundleReader
from lesft.errors import BundleError, LesftError, OutOfOrder, Unreachable
from lesft.inference_messages import Question, Reply, reply_from_message, result_bytes
from lesft.interceptors import error_from
from lesft.v1 import inference_pb2, inference_pb2_grpc
from lesft.v1.tensor_pb2 import Chunk
from lesft.wire import WireCounter
from lesft_client.connector import Connector

T = TypeVar("T")


class Connection:
    """The connection that all sequences share.

    gRPC makes it again by itself when it breaks. When it falls silent, new streams share a new one.
    """

    def __init__(self, connector: Connector) -> None:
        """Connects when first used. Make it on the event loop that uses it."""
        self._connector = connector
        self._channels = [connector.open_aio()]
        self.party = f"server {connector.address}"

    @property
    def channel(self) -> grpc.aio.Channel:
        """The connection of now."""
        return self._channels[-1]

    def renew(self, silent: grpc.aio.Channel) -> None:
        """Give up a connection that fell silent, unless somebody has done so already.

        It stays open: another stream on it may not have found out yet, or may still be served.
        """
        if silent is self.channel:
            self._channels.append(self._connector.open_aio())

    async def close(self) -> None:
        """End it, and all streams on it."""
        for channel in self._channels:
            await channel.close()


class SequenceStream:
    """One call of Generate. Every method raises what ended it, as an error of our tree."""

    def __init__(
        self,
        connection: Connection,
        vocab_size: int,
        top_logits: int,
        stall_seconds: float,
        wire: WireCounter,
    ) -> None:
        self.channel = connection.channel
        self._party = connection.party
        self._vocab_size = vocab_size
        self._top_logits = top_logits
        self._stall_seconds = stall_seconds
        self._wire = wire
        self._call = inference_pb2_grpc.InferenceServiceStub(self.channel).Generate()
        self._next_index = 0
        self.fell_silent = False
        """Whether it was given up because nothing was heard for too long."""

    @property
    def next_index(self) -> int:
        """The number of the step that is due."""
        return self._next_index

    async def open(self, opening: inference_pb2.OpenSequence) -> None:
        """Open the sequence. Raises Busy when the server has no room, or what it refuses."""
        await self._write(inference_pb2.GenerateRequest(open=opening))
        response = await self._read()
        if response is None or response.WhichOneof("message") != "opened":
            raise OutOfOrder(f"{self._party}: did not answer the opening; is it a LESFT server?")
        # A server whose heartbeats are rarer than our patience is not to be taken for dead.
        heartbeat_seconds = response.opened.heartbeat_seconds
        self._stall_seconds = max(self._stall_seconds, 3 * heartbeat_seconds)

    async def step(
        self, header: inference_pb2.DecodeStep, more: Sequence[Chunk], question: Question
    ) -> Reply:
        """Send a step and wait for what comes of it."""
        await self._write(inference_pb2.GenerateRequest(step=header))
        for chunk in more:
            await self._write(inference_pb2.GenerateRequest(chunk=chunk))
        self._next_index += 1
        response = await self._read()
        while response is not None and response.WhichOneof("message") == "heartbeat":
            response = await self._read()
        if response is None or response.WhichOneof("message") != "result":
            raise OutOfOrder(f"{self._party}: ended the sequence without a result")
        if response.result.index != header.index:
            raise OutOfOrder(
                f"{self._party}: the result of step {header.index} is due, got that of "
                f"{response.result.index}"
            )
        bundle = b""
        if response.result.HasField("bundle"):
            bundle = await self._read_bundle(response.result, question)
        result = response.result
        return reply_from_message(result, bundle, question, self._top_logits, self._vocab_size)

    async def _read_bundle(self, result: inference_pb2.DecodeResult, question: Question) -> bytes:
        reader = BundleReader(result.bundle, result_bytes(question, self._top_logits))
        reader.add(result.chunk)
        while not reader.complete:
            response = await self._read()
            if response is None or response.WhichOneof("message") != "chunk":
                raise BundleError(f"{self._party}: chunk {reader.next_index} is missing")
            reader.add(response.chunk)
        return reader.data()

    def close(self) -> None:
        """End the call, whatever is under way."""
        self._call.cancel()

    # ------------------------------------------------------------------ messages

    async def _write(self, request: inference_pb2.GenerateRequest) -> None:
        await self._within_stall(self._call.write(request))
        self._wire.add("up", "other", request.ByteSize())

    async def _read(self) -> inference_pb2.GenerateResponse | None:
        """The next message; None when the server has closed the stream well."""
        response = await self._within_stall(self._call.read())
        if not isinstance(response, inference_pb2.GenerateResponse):  # the end of the stream
            return None
        self._wire.add("down", "other", response.ByteSize())
        return response

    async def _within_stall(self, doing: Awaitable[T]) -> T:
        """Ends the call when it falls silent: cheaper than a task for every message."""
        loop = asyncio.get_running_loop()
        silent = loop.call_later(self._stall_seconds, self._give_up)
        try:
            return await doing
        except (grpc.RpcError, asyncio.InvalidStateError):
            raise await self._end() from None
        except asyncio.CancelledError:
            if self.fell_silent:
                raise self._silent() from None
            raise
        finally:
            silent.cancel()

    def _give_up(self) -> None:
        self.fell_silent = True
        self._call.cancel()

    def _silent(self) -> Unreachable:
        return Unreachable(f"{self._party}: nothing was heard of it for {self._stall_seconds:g} s")

    async def _end(self) -> LesftError:
        """Why the call has ended."""
        if self.fell_silent:
            return self._silent()
        call = self._call
        error = grpc.aio.AioRpcError(
            await call.code(),
            await call.initial_metadata(),
            await call.trailing_metadata(),
            await call.details(),
        )
        return error_from(error, self._party)
