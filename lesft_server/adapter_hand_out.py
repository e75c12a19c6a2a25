"""The hand-out of Φ: who may have the server's half of the adapter, when, and as what."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

from lesft.adapter_halves import load_half
from lesft.adapters import num_layers
from lesft.bundle import bundle_chunks, bundle_info
from lesft.errors import HandshakeMismatch, NotAllowed, OutOfOrder
from lesft.tensors import encode_tensors
from lesft.v1 import model_pb2
from lesft_server.handshake import check_protocol_version
from lesft_server.run import Run, RunState


class AdapterHandOut:
    """The half in the state folder; read once, when it is first asked for."""

    def __init__(self, run: Run, file: Path, allowed: bool) -> None:
        self._run = run
        self._file = file
        self._allowed = allowed
        self._lock = asyncio.Lock()
        self._ready: tuple[model_pb2.AdapterHeader, bytes] | None = None

    async def pieces(
        self, request: model_pb2.FetchAdapterRequest
    ) -> Iterator[model_pb2.FetchAdapterResponse]:
        """The answer's messages, in order.

        Raises NotAllowed when the operator does not share it, OutOfOrder before the run is
        finished, HandshakeMismatch when the client's half is of another run or round.
        """
        check_protocol_version(request.protocol_version)
        self._check_allowed()
        self._check_same(request)
        async with self._lock:  # of several clients at a time, one has it read
            if self._ready is None:
                self._ready = await asyncio.to_thread(self._read)
        return _pieces(*self._ready)

    def _check_allowed(self) -> None:
        if not self._allowed:
            raise NotAllowed(
                "this server does not hand out its half of the adapter: ask its operator to start "
                "it with --share-adapter, or to give you its adapter.safetensors for --back"
            )
        if self._run.state is not RunState.FINISHED:
            done, rounds = len(self._run.rounds), self._run.spec.rounds
            raise OutOfOrder(
                f"the run is not finished: {done} of {rounds} rounds are done; ask again after "
                "the last one"
            )

    def _check_same(self, request: model_pb2.FetchAdapterRequest) -> None:
        spec = self._run.spec
        for name, ours, theirs in (
            ("spec_fingerprint", spec.fingerprint(), request.spec_fingerprint[:80] or "none"),
            ("rounds", spec.rounds, request.rounds),
        ):
            if ours != theirs:
                raise HandshakeMismatch(
                    f"{name}: server {ours}, client {theirs}; both halves must be of the same "
                    "run, each after its last round: ask the server that the client trained with"
                )

    def _read(self) -> tuple[model_pb2.AdapterHeader, bytes]:
        half = load_half(self._file)
        data = encode_tensors(half.tensors, "raw")
        header = model_pb2.AdapterHeader(
            bundle=bundle_info(data),
            run_id=half.info.run_id,
            spec_fingerprint=half.info.spec_fingerprint,
            cut_layer=half.info.cut_layer,
            rounds=half.info.rounds,
            num_layers=num_layers(half.tensors),
        )
        return header, data


def _pieces(
    header: model_pb2.AdapterHeader, data: bytes
) -> Iterator[model_pb2.FetchAdapterResponse]:
    yield model_pb2.FetchAdapterResponse(header=header)
    for chunk in bundle_chunks(data):
        yield model_pb2.FetchAdapterResponse(chunk=chunk)
