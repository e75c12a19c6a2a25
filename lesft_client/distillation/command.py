"""`lesft-client distill`: from questions and a teacher to a training set."""

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lesft.errors import DataError, InvalidInput, LesftError
from lesft.files import write_atomically
from lesft_client.counted_progress import wants_bar
from lesft_client.data import Sample
from lesft_client.data_command import samples_of
from lesft_client.distillation.address import TeacherAddress, read_address, read_key
from lesft_client.distillation.asking import ask_all
from lesft_client.distillation.display import Display
from lesft_client.distillation.journal import Journal, Outcome, open_journal
from lesft_client.distillation.pace import Backoff, Clock, Pace, Patience
from lesft_client.distillation.settings import DistillSettings
from lesft_client.distillation.teacher import Teacher, open_http
from lesft_client.distillation.training_set import (
    faults_of,
    how_it_was_made,
    summary,
    training_lines,
)

_FORMAT = 1
"""Changes with the rules by which answers are read: what was judged by others is not gone on with.
"""

_BACKOFF = Backoff()


def distill(settings: DistillSettings, backoff: Backoff = _BACKOFF) -> str:
    """Ask the teacher every question, write the training set, and return a summary to print.

    Starting it again goes on where it was interrupted. Raises DataError when no answer was right or
    the data cannot be used, InvalidInput when settings or the teacher's replies rule it out,
    Unreachable when the teacher has not answered for --patience-seconds.
    """
    address = read_address(settings.teacher)
    key = read_key(settings.teacher_key_file)
    samples = _questions(settings)
    if settings.output.exists() and not settings.progress_file.exists():
        raise InvalidInput(
            f"--output {settings.output} is there already, without the "
            f"{settings.progress_file.name} of this command: choose another --output, or remove it"
        )
    with open_journal(settings.progress_file, _fingerprint(settings, address, samples)) as journal:
        _ask(settings, address, key, samples, journal, backoff)
        outcomes = [journal.by_index[index] for index in range(len(samples))]
        _check_any_kept(settings, outcomes)
        write_atomically(settings.output, training_lines(samples, journal.by_index))
        made = how_it_was_made(settings, address.shown, outcomes)
        write_atomically(settings.meta_file, json.dumps(made, indent=2).encode() + b"\n")
    return summary(settings, address.shown, outcomes)


def _questions(settings: DistillSettings) -> list[Sample]:
    samples = samples_of(settings, settings.split)
    unknown = sum(not sample.answer for sample in samples)
    if unknown:
        raise DataError(
            f'{unknown} of {len(samples)} samples of --data {settings.data} have no "answer", so a '
            "teacher's answer to them cannot be checked: add one to each, or leave them out"
        )
    return samples


def _fingerprint(
    settings: DistillSettings, address: TeacherAddress, samples: Sequence[Sample]
) -> dict[str, Any]:
    """Whatever decides the training set, by the name that its user knows it under."""
    data = json.dumps([asdict(sample) for sample in samples]).encode()
    return {
        "format": _FORMAT,
        "--data of SHA-256": hashlib.sha256(data).hexdigest(),
        "--teacher": address.shown,
        "--teacher-model": settings.teacher_model,
        "--tries": settings.tries,
        "--retry-temperature": settings.retry_temperature,
        "--max-tokens": settings.max_tokens,
        "--data-seed": settings.data_seed,
    }


def _ask(
    settings: DistillSettings,
    address: TeacherAddress,
    key: str,
    samples: Sequence[Sample],
    journal: Journal,
    backoff: Backoff,
) -> None:
    """Ask what is open; what ends that early says how to go on."""
    kept = sum(bool(outcome.target) for outcome in journal.by_index.values())
    display = Display(len(samples), len(journal.by_index), kept, wants_bar(settings.progress))
    clock = Clock()

    async def run() -> None:
        async with open_http(address, key, settings.timeout_seconds, settings.concurrency) as http:
            teacher = Teacher(
                address,
                key,
                settings.teacher_model,
                settings.max_tokens,
                http,
                Pace(settings.requests_per_minute, clock),
                Patience(settings.patience_seconds, clock),
                backoff,
                display.waiting,
            )
            await ask_all(samples, settings, teacher, journal, display)

    try:
        with display:
            asyncio.run(run())
    except KeyboardInterrupt:
        display.say(_how_to_go_on(settings, journal, len(samples)))
        raise
    except LesftError as error:
        raise type(error)(f"{error}; {_how_to_go_on(settings, journal, len(samples))}") from None


def _how_to_go_on(settings: DistillSettings, journal: Journal, total: int) -> str:
    if not journal.by_index:
        return "no question is done yet"
    return (
        f"{len(journal.by_index)} of {total} questions are done and kept in "
        f"{settings.progress_file}; the same command goes on from there"
    )


def _check_any_kept(settings: DistillSettings, outcomes: Sequence[Outcome]) -> None:
    if any(outcome.target for outcome in outcomes):
        return
    faults = ", ".join(f"{fault} {count}" for fault, count in faults_of(outcomes))
    raise DataError(
        f"{settings.teacher_model} answered none of the {len(outcomes)} questions in a way that "
        f"can be kept ({faults}); nothing was written but {settings.progress_file}. Take another "
        "--teacher-model, more --tries or more --max-tokens, with another --output or without "
        "that file"
    )
