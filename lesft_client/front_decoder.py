"""The front's half of split decoding: all sequences of this client, their steps in batches."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lesft.batching import Batcher
from lesft.decoding import SequenceCache, Step, front_steps
from lesft.device import Precision, autocast
from lesft.device_thread import DeviceThread


@dataclass(frozen=True)
class _Work:
    cache: SequenceCache
    token_ids: Sequence[int]
    tentative: bool
    keep: int


class FrontDecoder:
    """Token ids to cut-layer activations. Lives on an event loop; computes in a thread."""

    def __init__(
        self, front: PreTrainedModel, device: DeviceThread, precision: Precision = "fp32"
    ) -> None:
        """`front` has its adapters, or none. It closes `device`, which is for it alone."""
        self.config = front.config
        self._front = front
        self._front.train(False)
        self.precision: Precision = precision
        self._device = device
        self._batcher: Batcher[_Work, torch.Tensor] = Batcher(self._run)

    async def activations(
        self,
        sequence: object,
        cache: SequenceCache,
        token_ids: Sequence[int],
        tentative: bool,
        keep: int,
    ) -> torch.Tensor:
        """Activations `[Q, D]` of a sequence's next tokens, on the CPU.

        Before that the cache keeps the first `keep` of its tentative tokens, and afterwards it
        holds these back too where they are `tentative`.
        """
        work = _Work(cache, token_ids, tentative, keep)
        length = cache.length + keep + len(token_ids)
        return await self._batcher.submit(sequence, work, len(token_ids), length)

    def forget(self, sequence: object) -> None:
        """The sequence is over."""
        self._batcher.forget(sequence)

    async def close(self) -> None:
        """End the thread."""
        await asyncio.to_thread(self._device.close)

    async def _run(self, works: Sequence[_Work]) -> list[torch.Tensor]:
        return await self._device.run(lambda: self._run_on_device(works))

    def _run_on_device(self, works: Sequence[_Work]) -> list[torch.Tensor]:
        steps = []
        for work in works:
            work.cache.keep(work.keep)
            ids_Q = torch.tensor(work.token_ids, device=self._front.device)
            steps.append(Step(work.cache, ids_Q, work.tentative))
        with autocast(self._front.device, self.precision):
            return [hidden_QD.cpu() for hidden_QD in front_steps(self._front, steps)]
