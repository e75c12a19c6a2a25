"""Settings from a command line, plans, and folders full of made-up results."""

from pathlib import Path

from lesft.settings import load_settings
from lesft_testbed.comparison.command_lines import command_line
from lesft_testbed.comparison.plan import Plan, make_plan
from lesft_testbed.comparison.presets import LAYERS
from lesft_testbed.comparison.settings import CompareSettings
from tests.comparison.fake_run import write_results

MODEL = "models/tiny"


def settings_of(*words: str) -> CompareSettings:
    """As from the command line."""
    return load_settings(CompareSettings, "lesft-testbed compare", list(words))


def plan_of(*words: str) -> Plan:
    """The plan of a command line; the model has 30 layers."""
    return make_plan(settings_of(*words), {**LAYERS, MODEL: 30}, MODEL)


def fill(plan: Plan, output: Path, but: tuple[str, ...] = ()) -> None:
    """Results of all planned runs but those named."""
    for run in plan.runs:
        if run.name not in but:
            write_results(command_line(run, output, output / "cache"))
