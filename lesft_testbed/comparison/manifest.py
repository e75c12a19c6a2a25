"""The list of all runs' commands, for Slurm arrays, Kubernetes jobs, xargs or any other queue."""

import json
import shlex
from pathlib import Path

from lesft.files import write_atomically
from lesft_testbed.comparison.command_lines import command_line, relative, run_folder
from lesft_testbed.comparison.plan import Plan

MANIFEST, MANIFEST_LINES = "manifest.txt", "manifest.jsonl"


def write_manifest(plan: Plan, output: Path, cache: Path) -> None:
    """manifest.txt has one shell command a line; manifest.jsonl the same as words, with the names.

    Both are for the folder in which the comparison was started.
    """
    lines, records = [], []
    for run in plan.runs:
        words = command_line(run, output, cache)
        lines.append(shlex.join(words))
        folder = str(relative(run_folder(output, run)))
        records.append(
            {"name": run.name, "kind": run.kind, "method": run.method, "model": run.model}
            | {"data": run.data, "seed": run.seed, "output": folder, "command": words}
        )
    write_atomically(output / MANIFEST, _text(lines))
    write_atomically(output / MANIFEST_LINES, _text([json.dumps(each) for each in records]))


def _text(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
