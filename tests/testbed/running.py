"""`lesft-testbed run` as a process, with a tiny model, and what is compared after it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from lesft_client.data import client_share, encode_samples, load_samples
from tests.processes.harness import Process, make_samples, write_samples

CLIENTS, SAMPLES, HELD_OUT = 2, 4, 2

RUN_SECONDS = 300
"""How long a whole run may take on a busy machine: each of its processes loads torch."""


def write_data(folder: Path) -> Path:
    """Short problems with answers."""
    samples = [{**sample, "answer": sample["target"][6:-1]} for sample in make_samples(50)]
    return write_samples(folder / "data.jsonl", samples)


@contextmanager
def running_testbed(model: Path, data: Path, output: Path, *options: str) -> Iterator[Process]:
    """The command, which is gone when the block ends, with all that it started."""
    if not any(option.startswith("--questions") for option in options):
        options = (*options, "--questions=0")
    process = Process(
        "lesft-testbed",
        "run",
        *(f"--output={output}", f"--model={model}", f"--data={data}", f"--clients={CLIENTS}"),
        *(f"--samples={SAMPLES}", f"--held-out={HELD_OUT}", f"--cache={output.parent / 'cache'}"),
        *("--server-threads=1", "--progress=lines"),
        *options,
        cwd=output.parent,
    )
    try:
        yield process
    finally:
        services = services_of(output)
        process.end()
        for service in services:
            service.kill()


def services_of(output: Path) -> list[psutil.Process]:
    """The services of a run, known by their state folders."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if any(word.startswith(f"--state={output}/") for word in command):
            found.append(process)
    return found


def held_out_nll(model: Any, tokenizer: Any, data: Path) -> float:
    """Mean -log P per held-out target token of all clients, by torch and peft alone."""
    nll, tokens = 0.0, 0
    drawn = load_samples(str(data), "test", CLIENTS * HELD_OUT, seed=0)
    for index in range(CLIENTS):
        share = client_share(drawn, index, CLIENTS, HELD_OUT, seed=0)
        for sample in encode_samples(share, tokenizer, 1024)[0]:
            ids = torch.tensor([sample.base_ids + sample.target_ids])
            with torch.no_grad():
                log_probs = torch.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
            for position in range(len(sample.base_ids), ids.shape[1]):
                nll -= float(log_probs[position - 1, ids[0, position]])
                tokens += 1
    return nll / tokens
