"""Asking the teacher every question that is still open, several at a time."""

import asyncio
from collections.abc import Iterator, Sequence

from lesft.seeds import derive_seed
from lesft_client.data import Sample
from lesft_client.distillation.display import Display
from lesft_client.distillation.journal import Journal, Outcome
from lesft_client.distillation.settings import DistillSettings
from lesft_client.distillation.teacher import Teacher
from lesft_client.distillation.verdict import Fault, Verdict, judge

_SEED_BITS = 31
"""Services store seeds in signed integers of 32 bits at the least."""


async def ask_all(
    samples: Sequence[Sample],
    settings: DistillSettings,
    teacher: Teacher,
    journal: Journal,
    display: Display,
) -> None:
    """Ask what the journal has no outcome for, in the order of the samples.

    `settings.concurrency` questions are open at the same time. Raises what ends the run, after
    which every outcome until then is in the journal.
    """
    left = iter([index for index in range(len(samples)) if index not in journal.by_index])

    async def work(indices: Iterator[int]) -> None:
        for index in indices:
            outcome = await ask_one(index, samples[index], settings, teacher)
            journal.add(outcome)
            display.finished(kept=bool(outcome.target), requests=teacher.requests)

    workers = [asyncio.create_task(work(left)) for _ in range(settings.concurrency)]
    ticker = asyncio.create_task(display.keep_ticking())
    try:
        await asyncio.gather(*workers)
    finally:
        for task in (*workers, ticker):
            task.cancel()
        await asyncio.gather(*workers, ticker, return_exceptions=True)


async def ask_one(
    index: int, sample: Sample, settings: DistillSettings, teacher: Teacher
) -> Outcome:
    """Ask one question until an answer is right or the tries are used up.

    The first try has temperature 0. Each has a seed of its own, which depends on the question's
    place and on --data-seed alone. A question that the teacher does not take is not tried again.
    """
    faults: list[Fault] = []
    prompt_tokens = completion_tokens = 0
    target = ""
    while not target and len(faults) < settings.tries and "refused" not in faults:
        number = len(faults) + 1
        completion = await teacher.ask(
            sample.prompt,
            temperature=0.0 if number == 1 else settings.retry_temperature,
            seed=derive_seed(settings.data_seed, "distill", index, number) % 2**_SEED_BITS,
        )
        prompt_tokens += completion.prompt_tokens
        completion_tokens += completion.completion_tokens
        if completion.refused:
            verdict = Verdict(fault="refused")
        else:
            verdict = judge(completion.text, completion.finish_reason, sample.answer)
        target = verdict.target
        if verdict.fault:
            faults.append(verdict.fault)
    return Outcome(
        index=index,
        target=target,
        tries=len(faults) + bool(target),
        faults=tuple(faults),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
    )
