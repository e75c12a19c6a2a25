"""Stands in for `lesft-testbed run` and `lesft-client evaluate`: their options, made-up results.

As a program it can also fail or dawdle, by words in the file that FAKE_RUNS names: `fail NAME`,
`slow NAME`, `mute NAME`. It notes each start in `started` beside that file.
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from lesft_testbed.data_digest import data_sha256
from lesft_testbed.methods import METHODS
from lesft_testbed.settings import RunSettings

ACCURACY = {"lesft": 0.4, "splitlora": 0.35, "zero-shot": 0.05, "few-shot": 0.15}
NOT_OF_THE_RUN = {"output", "config", "cache", "progress"}


def options_of(words: list[str]) -> dict[str, Any]:
    """What a command line gives, by name."""
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        is_off = not equals and name.startswith("no-")
        key = name.removeprefix("no-") if is_off else name
        options[key.replace("-", "_")] = value if equals else not is_off
    return options


def questions_of(method: str, seed: int, count: int, samples: int) -> list[dict[str, Any]]:
    """Drawn from method and seed: more samples, more right answers and a smaller -log P."""
    draw = random.Random(f"{method} {seed} {samples}")
    share = ACCURACY.get(method, 0.3) + samples / 400
    return [
        {
            "index": index,
            "right": draw.random() < share,
            "nll": draw.gauss(20 * (1.4 - share), 1),
            "nll_tokens": 20,
            "prompt": f"seed {seed} question {index}",
        }
        for index in range(count)
    ]


def digest_of(data: str, seed: int) -> str:
    """Over the questions that a seed draws."""
    return f"sha256:{data} {seed} {data_sha256(data)}"


def write_training(words: list[str]) -> None:
    """The report.json and questions.json of a run with these options."""
    from lesft.settings import load_settings

    settings = load_settings(RunSettings, "fake", words)
    method, trained = METHODS[settings.method], settings.as_trained()
    settings.output.mkdir(parents=True, exist_ok=True)
    rounds = settings.num_rounds
    size = 1_000_000 * settings.clients * settings.samples if method.split else 0
    two_paths = settings.loss.needs_reference
    wire = {
        "activations_base": {"up": size, "down": 0},
        "activations_reference": {"up": size if two_paths else 0, "down": 0},
        "gradients": {"up": 0, "down": size if method.train_front else 0},
        "adapters": {"up": 500_000 * method.aggregate, "down": 500_000 * method.aggregate},
        "other": {"up": time.time_ns() % 1000, "down": 7},
    }
    report = {
        "settings": settings.model_dump(mode="json", exclude=NOT_OF_THE_RUN),
        "cut_layer": 7 if method.split else None,
        "rounds": rounds,
        "samples_by_client": [trained.samples] * trained.clients,
        "loss_by_round": [2.0 - 0.01 * number for number in range(rounds)],
        "nll_by_round": [1.5 - 0.01 * number for number in range(rounds)],
        "class_counts_by_round": [[6, 1, 3] if two_paths else None] * rounds,
        "client_parameters": 40_000_000 if method.split else 135_000_000,
        "client_trained_parameters": 200_000,
        "wire": wire,
        "seconds": {"training": 10.0 * (1 + two_paths) * settings.samples, "total": time.time()},
        "peak_rss_mib": {"server": 900.0, "client-0": 500.0, "client-1": 510.0},
        "data_sha256": data_sha256(settings.data),
        "questions_digest": digest_of(settings.data, settings.seed),
    }
    asked = questions_of(settings.method, settings.seed, settings.questions, settings.samples)
    questions = {"before": None, "after": asked}
    (settings.output / "questions.json").write_text(json.dumps(questions))
    (settings.output / "report.json").write_text(json.dumps(report))


def write_untuned(words: list[str]) -> None:
    """The evaluation.json of an evaluation with these options."""
    options = options_of(words)
    numbers = ("data_seed", "questions", "shots", "max_tokens", "batch", "threads")
    settings = {name: int(v) if name in numbers else v for name, v in options.items()}
    method = "few-shot" if settings["shots"] else "zero-shot"
    asked = questions_of(method, settings["data_seed"], settings["questions"], 0)
    output = Path(options["output"])
    output.mkdir(parents=True, exist_ok=True)
    digest = digest_of(options["benchmark"], settings["data_seed"])
    report = {
        "settings": settings,
        "predictions": [{**each, "expected": str(each["index"])} for each in asked],
        "seconds": 3.0,
        "data_digest": digest + " with examples" * bool(settings["shots"]),
    }
    (output / "evaluation.json").write_text(json.dumps(report))


def write_results(command: list[str]) -> None:
    """What a planned command would leave."""
    (write_training if command[1] == "run" else write_untuned)(command[2:])


def main() -> None:
    script = Path(os.environ["FAKE_RUNS"])
    name = Path(options_of(sys.argv[2:])["output"]).name
    with script.with_name("started").open("a") as file:
        file.write(f"{name} {os.getpid()}\n")
    wishes = script.read_text().splitlines()
    if f"slow {name}" in wishes:
        time.sleep(60)
    if f"fail {name}" in wishes:
        sys.exit("the model melted")
    write_results(sys.argv)
    if f"mute {name}" in wishes:
        Path(options_of(sys.argv[2:])["output"], "questions.json").write_text('{"after": null}')


if __name__ == "__main__":
    main()
