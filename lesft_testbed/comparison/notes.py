"""What comparison.md says of how its tables and pictures are to be read."""

from collections.abc import Iterator

from lesft_testbed.comparison.plan import Place
from lesft_testbed.comparison.results import Comparison
from lesft_testbed.comparison.statistics import ALPHA

_READING = """\
`zero-shot` and `few-shot` are the untuned model. A seed draws training data, test questions and all
randomness of a run, the same for every method; seeds are taken as independent repetitions.
Intervals are 95% t-intervals of the mean over seeds. Of a JSONL file each seed holds out another
tenth, so that what one seed tests on another trains on: seeds are then not wholly independent, and
intervals somewhat too narrow. Where the questions are a whole test split, all seeds ask the same,
and intervals say nothing about other questions.

Differences are method minus {reference}, paired by seed. `p` is the paired t-test's, corrected by
Holm over the family: all rows of one table. A method is called better or worse only where this is
below {alpha:g}. The t-test takes differences between seeds as about normal, which few seeds cannot
check; with few seeds it finds large effects only, and "no difference shown" is no proof of
equality.

`questions` counts those that only the method and only {reference} answered right, of all seeds,
with McNemar's exact p (uncorrected): it takes the trained adapters as given, and says nothing about
another training. A question that several seeds ask counts once, for the first of them."""

_SAME_METHODS = """\
A method that is the same as another, under a second name, has the same runs; it is shown, and not
tested."""

_UNIFORM_WEIGHTS = """\
One weight for all tokens is a constant factor of the loss. Under AdamW that cancels, but for
epsilon and clipping (--optimizer.max-grad-norm, here {norm:g}; 0 is none): `uniform-` rows above 0
differ only where gradients are clipped. `uniform-0` trains nothing."""

_THREADS = """\
Times depend on how many cores a method may use: `centralized` is one process of {server} CPU
threads, split runs have a server of as many and {client} for each client, and `fedavg` and other
methods without a split have {client} for each client, side by side."""


def how_to_read(comparison: Comparison) -> Iterator[str]:
    """The section before all tables."""
    yield from ("", "## How to read this", "")
    if not comparison.measures:
        yield "No test questions were asked: this is about cost alone."
        return
    if len(comparison.settings["seeds"]) == 1:
        yield (
            "**There is one seed only: no intervals, no tests, and no method can be called better "
            "than another.**"
        )
        yield ""
    yield _READING.format(reference=comparison.reference, alpha=ALPHA)
    if comparison.same_as:
        yield from ("", _SAME_METHODS)
    if any(method.startswith("uniform-") for method in comparison.methods):
        norm = comparison.settings["optimizer"]["max_grad_norm"]
        yield from ("", _UNIFORM_WEIGHTS.format(norm=norm))


def repeated_questions(comparison: Comparison, place: Place) -> Iterator[str]:
    """Below a table: how many questions its column `questions` has left out; nothing for none."""
    tests = [test for test in comparison.tests if test.place == place]
    most = max(tests, key=lambda test: test.repeated_questions, default=None)
    if most is None or most.mcnemar is None or most.repeated_questions == 0:
        return
    counted = most.mcnemar.questions
    yield ""
    yield (
        f"Seeds ask the same questions here: of {counted + most.repeated_questions}, {counted} are "
        "different and count in the column `questions`, each for the first seed that asks it."
    )


def threads(comparison: Comparison) -> Iterator[str]:
    """Beside times: who had how many cores."""
    settings = comparison.settings
    server, client = (settings[f"{who}_threads"] or "all" for who in ("server", "client"))
    yield from ("", _THREADS.format(server=server, client=client))
