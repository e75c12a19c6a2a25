"""Which requests go together, and how long a batch waits for others, on a clock of the test's."""

import asyncio
import gc
import selectors
import weakref
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from lesft import batching
from lesft.batching import LARGE_STEP, MAX_BATCH, SHORTEST_GATHER_SECONDS, Batcher


class _Jumping(selectors.SelectSelector):
    """Where a loop would sleep, its clock jumps."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everybody waits, and nothing will happen"
        self.now += max(0.0, timeout)
        return super().select(0)


class Loop(asyncio.SelectorEventLoop):
    """An event loop on which waiting takes no time."""

    def __init__(self) -> None:
        self._clock = _Jumping()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def at(seconds: float) -> Any:
    """A time on that clock."""
    return pytest.approx(seconds, abs=1e-6)


@dataclass
class FakeModel:
    """Multiplies by ten, and remembers what went together and when."""

    loop: Loop
    seconds: float = 0.2
    large_seconds: float = 0.2
    fails: set[int] = field(default_factory=set)
    """Requests that their batch fails for."""
    refuses: set[int] = field(default_factory=set)
    """Requests that fail alone."""
    batches: list[list[int]] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)

    async def run(self, requests: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(requests))
        self.starts.append(self.loop.time())
        await asyncio.sleep(self.large_seconds if requests[0] >= 100 else self.seconds)
        for request in requests:
            if request in self.fails:
                raise RuntimeError(f"{request} is too much")
        return [
            ValueError(f"{request} is wrong") if request in self.refuses else 10 * request
            for request in requests
        ]


class Stage:
    """A batcher before a fake model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop = Loop()
        monkeypatch.setattr(batching, "time", SimpleNamespace(monotonic=self.loop.time))
        self.model = FakeModel(self.loop)
        self.batcher: Batcher[int, int] = Batcher(self.model.run)

    def run(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        return self.loop.run_until_complete(work())

    def ask(self, request: int, sequence: object = None, length: int = 0) -> "asyncio.Task[int]":
        """A request under way, of a sequence of its own unless one is given; large from 100 on."""
        sequence = request if sequence is None else sequence
        num_tokens = LARGE_STEP + 1 if request >= 100 else LARGE_STEP
        return asyncio.create_task(
            self.batcher.submit(sequence, request, num_tokens, length or num_tokens)
        )

    async def ask_after(self, seconds: float, request: int, sequence: object) -> int:
        await asyncio.sleep(seconds)
        return await self.ask(request, sequence)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Stage(monkeypatch)
    yield made
    made.loop.close()


# ---------------------------------------------------------------------- what goes together


def test_requests_that_wait_go_together_and_get_their_own_results(stage: Stage) -> None:
    async def work() -> list[int]:
        tasks = [stage.ask(1)]
        await asyncio.sleep(0.1)
        tasks += [stage.ask(request) for request in (5, 3, 4, 2)]
        return list(await asyncio.gather(*tasks))

    assert stage.run(work) == [10, 50, 30, 40, 20]
    assert stage.model.batches == [[1], [5, 3, 4, 2]]
    assert (stage.batcher.batches, stage.batcher.requests) == (2, 5)


def test_requests_of_one_moment_go_together_up_to_the_most_that_a_batch_may_have(
    stage: Stage,
) -> None:
    requests = list(range(MAX_BATCH + 6))

    async def work() -> list[int]:
        return list(await asyncio.gather(*(stage.ask(r, f"sequence {r}") for r in requests)))

    assert stage.run(work) == [10 * request for request in requests]
    assert stage.model.batches == [requests[:MAX_BATCH], requests[MAX_BATCH:]]


def test_large_requests_go_alone_in_turn_with_the_small_ones(stage: Stage) -> None:
    async def work() -> list[int]:
        tasks = [stage.ask(1)]
        await asyncio.sleep(0.1)
        tasks += [stage.ask(request) for request in (100, 2, 101, 3, 102)]
        await asyncio.sleep(0.6)  # while 2 and 3 are run
        tasks.append(stage.ask(4))
        return list(await asyncio.gather(*tasks))

    assert stage.run(work) == [10, 1000, 20, 1010, 30, 1020, 40]
    assert stage.model.batches == [[1], [100], [2, 3], [101], [4], [102]]


def test_large_requests_follow_each_other_where_there_is_no_small_one(stage: Stage) -> None:
    async def work() -> None:
        await asyncio.gather(*(stage.ask(request) for request in (100, 101, 102)))

    stage.run(work)
    assert stage.model.batches == [[100], [101], [102]]


def test_sequences_go_with_those_of_about_their_length_the_longest_waiting_first(
    stage: Stage,
) -> None:
    lengths = {2: 5000, 3: 10, 4: 600, 5: 256, 6: 2500, 7: 512, 8: 513}

    async def work() -> None:
        tasks = [stage.ask(1)]
        await asyncio.sleep(0.1)
        tasks += [stage.ask(request, length=length) for request, length in lengths.items()]
        await asyncio.gather(*tasks)

    stage.run(work)
    # Up to 256 tokens all are alike; beyond, up to twice or half as many.
    assert stage.model.batches == [[1], [2, 6], [3, 5, 7], [4, 8]]


# ---------------------------------------------------------------------- what goes wrong


def test_a_batch_that_fails_fails_all_in_it_and_no_other(stage: Stage) -> None:
    stage.model.fails = {3}

    async def work() -> list[Any]:
        tasks = [stage.ask(1)]
        await asyncio.sleep(0.1)
        tasks += [stage.ask(2), stage.ask(3)]
        await asyncio.sleep(0.3)  # while these are run
        tasks.append(stage.ask(4))
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        return [*answers, await stage.ask(2)]

    first, *failed, fourth, again = stage.run(work)
    assert (first, fourth, again) == (10, 40, 20)
    assert [str(error) for error in failed] == ["3 is too much"] * 2
    assert stage.model.batches == [[1], [2, 3], [4], [2]]


def test_a_request_that_fails_alone_fails_alone(stage: Stage) -> None:
    stage.model.refuses = {2}

    async def work() -> list[Any]:
        tasks = [stage.ask(request) for request in (1, 2, 3)]
        return [*await asyncio.gather(*tasks, return_exceptions=True), await stage.ask(4)]

    one, two, three, four = stage.run(work)
    assert (one, three, four) == (10, 30, 40)
    assert repr(two) == "ValueError('2 is wrong')"
    assert stage.model.batches == [[1, 2, 3], [4]]


def test_whoever_gives_up_before_or_during_a_batch_does_not_stop_the_others(stage: Stage) -> None:
    async def work() -> list[Any]:
        tasks = [stage.ask(1), stage.ask(2)]
        await asyncio.sleep(0.1)
        tasks += [stage.ask(3), stage.ask(4), stage.ask(5)]
        await asyncio.sleep(0.05)
        tasks[0].cancel()  # in its batch
        tasks[3].cancel()  # still waits
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    one, two, three, four, five = stage.run(work)
    assert isinstance(one, asyncio.CancelledError)
    assert isinstance(four, asyncio.CancelledError)
    assert (two, three, five) == (20, 30, 50)
    assert stage.model.batches == [[1, 2], [3, 5]]


def test_when_all_who_wait_give_up_nothing_is_run_and_the_next_request_is(stage: Stage) -> None:
    async def work() -> int:
        first = stage.ask(1)
        await asyncio.sleep(0.1)
        waiting = [stage.ask(2), stage.ask(100)]
        await asyncio.sleep(0.05)
        for task in waiting:
            task.cancel()
        await first
        await asyncio.sleep(1)
        return await stage.ask(3)

    assert stage.run(work) == 30
    assert stage.model.batches == [[1], [3]]


def test_all_are_told_when_whoever_runs_the_batches_has_ended(stage: Stage) -> None:
    async def cancelled(requests: Sequence[int]) -> list[int]:
        await asyncio.sleep(0.1)
        raise asyncio.CancelledError  # as from a device's thread that is closed

    stage.batcher = Batcher(cancelled)

    async def work() -> list[Any]:
        tasks = [stage.ask(1)]
        await asyncio.sleep(0.05)
        tasks.append(stage.ask(2))  # not in the batch
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    assert [type(answer) for answer in stage.run(work)] == [asyncio.CancelledError] * 2


# ---------------------------------------------------------------------- how long a batch waits


async def both(stage: Stage) -> None:
    """Two batches of a and b, which end at 0.4 s: later ones wait 0.1 s at most."""
    for _ in range(2):
        await asyncio.gather(stage.ask(1, "a"), stage.ask(2, "b"))


FIRST_TWO = [[1, 2], [1, 2]]


def test_nobody_waits_where_nobody_is_due(stage: Stage) -> None:
    async def work() -> None:
        for request in (1, 2, 3):
            await stage.ask(request, "a")

    stage.run(work)
    assert stage.model.starts == [at(0.0), at(0.2), at(0.4)]


def test_nobody_waits_for_a_sequence_that_has_never_come_back(stage: Stage) -> None:
    async def work() -> None:
        await asyncio.gather(stage.ask(1, "a"), stage.ask(2, "b"))
        await stage.ask(3, "a")

    stage.run(work)
    assert stage.model.starts == [at(0.0), at(0.2)]


def test_a_batch_waits_for_a_sequence_that_is_due(stage: Stage) -> None:
    async def work() -> None:
        await both(stage)
        for _ in range(3):
            await asyncio.gather(stage.ask(3, "a"), stage.ask_after(0.03, 4, "b"))

    stage.run(work)
    assert stage.model.batches == [*FIRST_TWO, [3, 4], [3, 4], [3, 4]]
    assert stage.model.starts[2:] == [at(0.43), at(0.66), at(0.89)]


def test_a_batch_waits_no_longer_than_half_the_time_that_one_takes(stage: Stage) -> None:
    async def work() -> None:
        await both(stage)
        await asyncio.gather(stage.ask(3, "a"), stage.ask_after(0.15, 4, "b"))

    stage.run(work)
    assert stage.model.batches == [*FIRST_TWO, [3], [4]]
    assert stage.model.starts[2] == at(0.5)


def test_a_quick_batch_still_waits_a_little(stage: Stage) -> None:
    stage.model.seconds = 0.001
    late = SHORTEST_GATHER_SECONDS - 0.001

    async def work() -> None:
        await both(stage)
        await asyncio.gather(stage.ask(3, "a"), stage.ask_after(late, 4, "b"))

    stage.run(work)
    assert stage.model.batches == [*FIRST_TWO, [3, 4]]


def test_a_large_request_does_not_make_the_others_wait_longer(stage: Stage) -> None:
    stage.model.large_seconds = 5.0

    async def work() -> None:
        await both(stage)
        for _ in range(2):
            await stage.ask(100, "c")
        await asyncio.gather(stage.ask(3, "a"), stage.ask_after(0.15, 4, "c"))

    stage.run(work)
    assert stage.model.batches == [*FIRST_TWO, [100], [100], [3], [4]]
    # The first of c waited for a and b, and the third of a for c: at most 0.1 s each.
    assert stage.model.starts[2:5] == [at(0.5), at(5.5), at(10.6)]


def test_nobody_waits_for_a_sequence_that_is_overdue(stage: Stage) -> None:
    async def work() -> None:
        await both(stage)
        for request in (3, 4, 5):
            await stage.ask(request, "a")

    stage.run(work)
    # The first of these waited for b, in vain.
    assert stage.model.starts[2:] == [at(0.5), at(0.7), at(0.9)]


def test_nobody_waits_for_a_sequence_that_is_known_to_take_its_time(stage: Stage) -> None:
    async def work() -> None:
        await both(stage)
        await stage.ask_after(3.0, 3, "b")
        await stage.ask(4, "a")

    stage.run(work)
    assert stage.model.starts[2:] == [at(3.4), at(3.6)]


def test_nobody_waits_for_a_sequence_that_is_forgotten(stage: Stage) -> None:
    async def work() -> None:
        await both(stage)
        stage.batcher.forget("b")
        stage.batcher.forget("nobody")
        await stage.ask(3, "a")

    stage.run(work)
    assert stage.model.starts[2:] == [at(0.4)]


def test_whoever_waits_for_a_sequence_goes_on_when_it_is_forgotten(stage: Stage) -> None:
    async def work() -> None:
        await both(stage)
        waiting = stage.ask(3, "a")
        await asyncio.sleep(0.05)
        stage.batcher.forget("b")
        await waiting

    stage.run(work)
    assert stage.model.starts[2:] == [at(0.45)]


def test_a_sequence_that_is_forgotten_while_its_batch_runs_stays_forgotten(stage: Stage) -> None:
    class Gone:
        """A sequence of a client that has gone."""

    async def work() -> "weakref.ref[Gone]":
        gone = Gone()
        for _ in range(2):
            await asyncio.gather(stage.ask(1, "a"), stage.ask(2, gone))
        waiting, other = stage.ask(2, gone), stage.ask(1, "a")
        await asyncio.sleep(0.1)
        waiting.cancel()
        stage.batcher.forget(gone)
        await other
        await stage.ask(3, "a")
        return weakref.ref(gone)

    ref = stage.run(work)
    gc.collect()
    assert stage.model.starts[2:] == [at(0.4), at(0.6)]  # nobody waited for it
    assert ref() is None  # and nobody holds it, with all its keys and values
