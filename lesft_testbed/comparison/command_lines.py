"""The command line of each planned run, to be started here or by a queue.

Paths stay as they were given: relative ones mean the folder that the comparison was started in.
"""

import os
from pathlib import Path

from lesft_testbed.commands import options, program
from lesft_testbed.comparison.plan import PlannedRun

RUNS_FOLDER = "runs"


def run_folder(output: Path, run: PlannedRun) -> Path:
    """The folder of a run's results below the comparison's."""
    return output / RUNS_FOLDER / run.name


def command_line(run: PlannedRun, output: Path, cache: Path) -> list[str]:
    """The program and its options, the program by its bare name."""
    where = {"output": relative(run_folder(output, run)), "progress": "lines"}
    if run.kind == "training":
        return [
            "lesft-testbed",
            "run",
            *options({**run.options, **where, "cache": from_home(cache)}),
        ]
    # A half-done evaluation under other settings would refuse to go on.
    return ["lesft-client", "evaluate", *options({**run.options, **where, "fresh": True})]


def installed(command: list[str]) -> list[str]:
    """The command with its program from beside this Python: the same environment."""
    return [program(command[0]), *command[1:]]


def relative(path: Path) -> Path:
    """A path below the current folder without that folder; any other as it is."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    return absolute.relative_to(here) if absolute.is_relative_to(here) else path


def from_home(path: Path) -> str:
    """A path below the home folder with `~`, which every command understands: so that a list of
    commands is for other machines, too."""
    if path.is_relative_to(Path.home()):
        return f"~/{path.relative_to(Path.home())}"
    return str(path)
