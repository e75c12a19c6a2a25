"""`lesft-client evaluate`: how many of a benchmark's questions the model answers right, and how
likely the data's own solutions are to it."""

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesft.errors import InvalidInput
from lesft_client.counted_progress import wants_bar
from lesft_client.evaluation.asking import Answer, Asked, Manner, ask, check_lengths
from lesft_client.evaluation.benchmark import Benchmark, load_benchmark
from lesft_client.evaluation.predictions import Prediction, Predictions, open_predictions
from lesft_client.evaluation.progress import EvaluationProgress
from lesft_client.evaluation.prompting import (
    Prompt,
    Solution,
    Style,
    make_prompt,
    make_solutions,
    prompt_fingerprint,
)
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
        settings.benchmark,
        settings.data,
        settings.questions,
        settings.shots,
        settings.data_seed,
        needs_answers=settings.measure != "likelihood",
    )
    _check_share(settings, benchmark)
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
                predictions.check(each.index, each.digest)
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


def _check_share(settings: EvaluateSettings, benchmark: Benchmark) -> None:
    number, _ = settings.share_parts
    if number > len(benchmark.questions):
        raise InvalidInput(
            f"--share {settings.share} of {len(benchmark.questions)} questions has none: ask more "
            "--questions, or make fewer shares"
        )


def _prepare(
    settings: EvaluateSettings,
    benchmark: Benchmark,
    manner: Manner,
    tokenizer: "PreTrainedTokenizerBase",
) -> list[Asked]:
    """The questions of the share, by their place among all."""
    number, of = settings.share_parts
    places = range(number - 1, len(benchmark.questions), of)
    questions = [benchmark.questions[place] for place in places]
    prompts: list[Prompt] | list[None] = [None] * len(questions)
    if settings.measure != "likelihood":
        style, scored = _wording(settings, manner)
        prompts = [make_prompt(q, benchmark.shots, style, scored, tokenizer) for q in questions]
    solutions: list[Solution] | list[None] = [None] * len(questions)
    if settings.measure != "accuracy":
        solutions = make_solutions(questions, benchmark.shots, tokenizer)
    return [Asked(*each) for each in zip(places, questions, prompts, solutions, strict=True)]


def _wording(settings: EvaluateSettings, manner: Manner) -> tuple[Style, bool]:
    """How prompts are worded, and whether letters are compared after them."""
    if settings.measure == "likelihood":
        return "chat", False
    return settings.prompt, manner.answer == "likelihood"


def _origin(
    settings: EvaluateSettings, benchmark: Benchmark, manner: Manner, model: "LanguageModel"
) -> Origin:
    style, scored = _wording(settings, manner)
    return Origin(
        benchmark=settings.benchmark,
        model=model.name,
        model_fingerprint=model.fingerprint,
        prompt_fingerprint=prompt_fingerprint(benchmark.shots, style, scored, model.tokenizer),
        data_digest=benchmark.digest,
        prompt=style,
        shots=settings.shots,
        measure=settings.measure,
        share=settings.share,
        answer=manner.answer,
        settings=settings.model_dump(mode="json"),
    )


def _conditions(settings: EvaluateSettings, origin: Origin, manner: Manner) -> dict[str, Any]:
    """What decides the predictions."""
    conditions = {
        "model": origin.model_fingerprint,
        "benchmark": Path(origin.benchmark).name,
        "questions": origin.data_digest,
        "measure": origin.measure,
        "share": origin.share,
        "prompt": origin.prompt,
        "shots": origin.shots,
        "prompt fingerprint": origin.prompt_fingerprint,
    }
    if settings.measure == "likelihood":
        return conditions
    conditions["answer"] = origin.answer
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
    with EvaluationProgress(len(asked), done.values(), bar) as progress:

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
