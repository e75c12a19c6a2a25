"""The command `lesft-testbed`."""

from lesft.commands import Command, Program

_SETTINGS = "lesft_testbed.settings"

PROGRAM = Program(
    "lesft-testbed",
    "LESFT on one machine: every service its own process, on its own sockets.",
    (
        Command(
            "run",
            "fine-tune a model by LESFT or another method, all on this machine; report on it",
            f"{_SETTINGS}:RunSettings",
            "lesft_testbed.run:run_testbed",
        ),
        Command(
            "compare",
            "run methods over models, data, seeds and sizes, and test them against each other",
            "lesft_testbed.comparison.settings:CompareSettings",
            "lesft_testbed.comparison.compare:compare",
        ),
        Command(
            "bench",
            "measure what training costs, against alternatives and targets",
            "lesft_testbed.bench.settings:BenchSettings",
            "lesft_testbed.bench.bench:bench",
        ),
        Command(
            "serve",
            "offer the result of a run as an OpenAI-compatible endpoint",
            f"{_SETTINGS}:ServeSettings",
            "lesft_testbed.serve:serve",
        ),
        Command(
            "chaos",
            "kill services and cut links during a run; the adapters must come out the same",
            f"{_SETTINGS}:ChaosSettings",
            "lesft_testbed.chaos:chaos",
        ),
        Command(
            "model",
            "make sure that the small default model is there and print its folder",
            f"{_SETTINGS}:ModelSettings",
            "lesft_testbed.default_model:model",
        ),
    ),
    when_interrupted="stopped; all services were ended",
)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    PROGRAM.run(argv)
