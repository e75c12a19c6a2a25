"""`lesft-client evaluate`: how many of a benchmark's questions the model answers right."""

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesft.errors import InvalidInput
from lesft_client.counted_progress import wants_bar
from lesft_client.evaluation.asking import Answer, Asked, Manner, ask, check_lengths
from lesft_client.evaluation.benchmark import Benchmark, load_benchmark
from lesft_client.evaluation.predictions import Prediction, Predictions, open_predictions
from lesft_client.evaluation.progress import EvaluationProgress
from lesft_client.evaluation.prompting import make_prompt, prompt_fingerprint
from lesft_client.evaluation.report import Origin, make_report, summary, write_report
from lesft_client.settings import EvaluateSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lesft_client.language_model import LanguageModel
    from lesft_client.model_thread import ModelThread


def evaluate(settings: EvaluateSettings) -> str:
    """Ask the questions, write predictions and report to --output, return a short table.

    What an earlier run with the same --output answered is not asked again. Raises DataError or
    InvalidInput for data, settings or earlier predictions that cannot be used, and what opens or
    ends the model's work; KeyboardInterrupt when the user stops it.
    """
    benchmark = load_benchmark(
        settings.benchmark, settings.data, settings.questions, settings.shots, settings.data_seed
    )
    manner = Manner(
        answer=chosen_answer(settings, benchmark),
        max_tokens=settings.max_tokens,
        sampling=settings.sampling,
        batch=settings.batch,
    )
    # Only now: torch takes longer to load than a wrong setting takes to find.
    from lesft_client.open_model import open_model

    return evaluate_with(open_model(settings), settings, benchmark, manner)


def evaluate_with(
    opening: "AbstractAsyncContextManager[LanguageModel]",
    settings: EvaluateSettings,
    benchmark: Benchmark,
    manner: Manner,
) -> str:
    """`evaluate` with the model that `opening` opens."""
    from lesft_client.model_thread import ModelThread

    with ModelThread(opening) as thread:
        model = thread.model
        asked = _prepare(settings, benchmark, manner, model.tokenizer)
        check_lengths(asked, manner, model.max_length)
        origin = _origin(settings, benchmark, manner, model)
        conditions = _conditions(settings, origin, manner)
        with open_predictions(settings.output, conditions, settings.fresh) as predictions:
            for each in asked:
                predictions.check(each.index, each.prompt.digest)
            _ask_the_rest(thread, asked, manner, predictions, wants_bar(settings.progress))
            report = make_report(origin, list(predictions.by_index.values()))
            write_report(report, settings.output)
    return f"{summary(report)}\n  {settings.output}"


def chosen_answer(settings: EvaluateSettings, benchmark: Benchmark) -> Answer:
    """How answers are read. Raises InvalidInput when the setting does not fit the questions."""
    of_choices: tuple[Answer, ...] = ("letter", "likelihood")
    if settings.answer == "auto":
        if not benchmark.has_choices:
            return "lenient"
        return "likelihood" if settings.prompt == "harness" else "letter"
    if (settings.answer in of_choices) != benchmark.has_choices:
        has = "lettered choices" if benchmark.has_choices else "no lettered choices"
        fitting = (
            of_choices if benchmark.has_choices else ("lenient", "strict", "flexible", "boxed")
        )
        raise InvalidInput(
            f"--answer {settings.answer} does not fit {settings.benchmark}, whose questions have "
            f"{has}: set it to {', '.join(fitting)} or auto"
        )
    return settings.answer


def _prepare(
    settings: EvaluateSettings,
    benchmark: Benchmark,
    manner: Manner,
    tokenizer: "PreTrainedTokenizerBase",
) -> list[Asked]:
    scored = manner.answer == "likelihood"
    return [
        Asked(index, each, make_prompt(each, benchmark.shots, settings.prompt, scored, tokenizer))
        for index, each in enumerate(benchmark.questions)
    ]


def _origin(
    settings: EvaluateSettings, benchmark: Benchmark, manner: Manner, model: "LanguageModel"
) -> Origin:
    scored = manner.answer == "likelihood"
    return Origin(
        benchmark=settings.benchmark,
        model=model.name,
        model_fingerprint=model.fingerprint,
        prompt_fingerprint=prompt_fingerprint(
            benchmark.shots, settings.prompt, scored, model.tokenizer
        ),
        data_digest=benchmark.digest,
        prompt=settings.prompt,
        shots=settings.shots,
        answer=manner.answer,
        settings=settings.model_dump(mode="json"),
    )


def _conditions(settings: EvaluateSettings, origin: Origin, manner: Manner) -> dict[str, Any]:
    """What decides the predictions."""
    conditions = {
        "model": origin.model_fingerprint,
        "benchmark": Path(origin.benchmark).name,
        "questions": origin.data_digest,
        "prompt": origin.prompt,
        "shots": origin.shots,
        "prompt fingerprint": origin.prompt_fingerprint,
        "answer": origin.answer,
    }
    if manner.answer != "likelihood":
        sampling = manner.sampling.model_dump(mode="json")
        conditions |= {"max_tokens": settings.max_tokens, "sampling": sampling}
    return conditions


def _ask_the_rest(
    thread: "ModelThread",
    asked: list[Asked],
    manner: Manner,
    predictions: Predictions,
    bar: bool,
) -> None:
    done = predictions.by_index
    rest = [each for each in asked if each.index not in done]
    right = sum(prediction.right for prediction in done.values())
    with EvaluationProgress(len(asked), len(done), right, bar) as progress:

        def keep(prediction: Prediction) -> None:
            progress.advance(predictions.add(prediction))

        try:
            thread.run(ask(thread.model, rest, manner, keep))
        except BaseException:
            progress.say(
                f"{len(done)} of {len(asked)} questions are answered; the same command goes on "
                "from there"
            )
            raise
