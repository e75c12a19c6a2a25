"""The cohort: all clients' parts of one micro-batch, batched into one step of the back."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lesft.adapters import lora_state
from lesft.back import Back
from lesft.cohort_batch import Part
from lesft.errors import LesftError, RunStopped
from lesft.files import write_atomically
from lesft.micro_batch import MicroBatch, StepKey, StepResult
from lesft.tensors import encode_tensors
from lesft_server.device_thread import DeviceThread
from lesft_server.run import RoundRecord, Run, RunState

log = logging.getLogger(__name__)

_Waiting = dict[str, tuple[MicroBatch, "asyncio.Future[StepResult]"]]


class Cohort:
    """Collects parts by key; the last one of a key starts the step for all of them.

    Clients send their keys in order, so the keys' cohorts become complete in order too.
    """

    def __init__(self, run: Run, back: Back, device: DeviceThread, adapter_file: Path) -> None:
        """`adapter_file` is where Φ is written after the last round."""
        self._run = run
        self._back = back
        self._device = device
        self._adapter_file = adapter_file
        self._waiting: dict[StepKey, _Waiting] = {}
        self._steps: set[asyncio.Task[None]] = set()
        self._window: list[tuple[Sequence[float], list[StepResult]]] = []
        self._window_start: float | None = None

    async def take(self, client_id: str, batch: MicroBatch) -> StepResult:
        """Hand in a client's part and wait for its result."""
        future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        self._window_start = self._window_start or time.monotonic()
        waiting = self._waiting.setdefault(batch.key, {})
        waiting[client_id] = (batch, future)
        if len(waiting) == self._run.spec.clients:
            del self._waiting[batch.key]
            # A task of its own: the step must not end with the call of the client that came last.
            step = asyncio.create_task(self._step(batch.key, waiting))
            self._steps.add(step)
            step.add_done_callback(self._steps.discard)
        return await future

    def withdraw(self, client_id: str) -> None:
        """Drop the parts of a client that is gone, but for those whose step has been started."""
        for waiting in self._waiting.values():
            waiting.pop(client_id, None)

    async def _step(self, key: StepKey, waiting: _Waiting) -> None:
        """Run a complete cohort in client-id order and hand out the results."""
        shares = self._run.shares()
        parts = [Part(name, waiting[name][0], share) for name, share in shares.items()]
        try:
            results = await self._device.run(lambda: self._train(key, parts))
        except Exception as error:
            if not isinstance(error, LesftError):
                log.exception("%s failed", key)
                error = RunStopped(f"{key} failed on the server; its log has the details")
            self._run.stop(str(error))  # ends every call that waits for this step
            return
        if self._run.state is not RunState.TRAINING:
            return
        self._record(key, list(shares.values()), results)
        for name, result in zip(shares, results, strict=True):
            future = waiting[name][1]
            if not future.done():
                future.set_result(result)

    def _train(self, key: StepKey, parts: list[Part]) -> list[StepResult]:
        """On the device thread. Φ is on disk before anyone hears that the last step is done."""
        if self._run.state is not RunState.TRAINING:
            raise RunStopped(f"{key} came too late")
        results = self._back.train_step(key, parts)
        if key.following(self._run.spec.accumulation).round == self._run.spec.rounds:
            state = lora_state(self._back.model, self._run.spec.cut_layer)
            write_atomically(self._adapter_file, encode_tensors(state, "raw"))
        return results

    def _record(self, key: StepKey, shares: Sequence[float], results: list[StepResult]) -> None:
        self._window.append((shares, results))
        if key.micro < self._run.spec.accumulation - 1:
            return
        window, self._window = self._window, []
        now = time.monotonic()
        start, self._window_start = self._window_start or now, now
        self._run.record(
            RoundRecord(
                round=key.round,
                loss=_mean_by_share(window, lambda result: result.loss),
                nll=_mean_by_share(window, lambda result: result.nll),
                class_counts=_sum_counts([r for _, results in window for r in results]),
                seconds=now - start,
            )
        )


def _mean_by_share(
    window: list[tuple[Sequence[float], list[StepResult]]], figure: Callable[[StepResult], float]
) -> float:
    sums = [
        sum(share * figure(result) for share, result in zip(shares, results, strict=True))
        for shares, results in window
    ]
    return sum(sums) / len(sums)


def _sum_counts(results: list[StepResult]) -> tuple[int, int, int] | None:
    counts = [result.class_counts for result in results if result.class_counts is not None]
    if not counts:
        return None
    salient, sub_salient, irrelevant = (sum(column) for column in zip(*counts, strict=True))
    return salient, sub_salient, irrelevant
