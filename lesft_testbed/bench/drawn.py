"""Which samples a run's clients draw, as token ids: a program, JSON in and JSON out.

It uses the client's own code in a process of its own: the testbed imports no service.
"""

import json
import sys
from pathlib import Path
from typing import Any

from lesft.commands import load
from lesft.hub import model_folder
from lesft_testbed.commands import client_name


def drawn_samples(request: dict[str, Any]) -> dict[str, Any]:
    """`micro_batches`: round, micro-batch, client, sample; and the width of the model.

    `request` has the settings of the run by their names, as report.json has them.
    """
    folder = model_folder(request["model"])
    clients = [_encoded(request, index) for index in range(request["clients"])]
    rounds = [
        [
            [_draw(request, index, samples, r, m) for index, samples in enumerate(clients)]
            for m in range(request["accumulation"])
        ]
        for r in range(request["rounds"])
    ]
    config = json.loads((folder / "config.json").read_bytes())
    return {"micro_batches": rounds, "hidden_size": config["hidden_size"]}


def _encoded(request: dict[str, Any], index: int) -> list[dict[str, list[int]]]:
    """One client's training samples."""
    clients, each, seed = request["clients"], request["samples"], request["seed"]
    samples = load("lesft_client.data:load_samples")(request["data"], "train", clients * each, seed)
    share = load("lesft_client.data:client_share")(samples, index, clients, each, seed)
    tokenizer = load("lesft_client.tokenizer:load_tokenizer")(request["model"])
    encode = load("lesft_client.data:encode_samples")
    kept, _ = encode(share, tokenizer, request["max_length"])
    return [
        {"base": s.base_ids, "reference": s.reference_ids, "target": s.target_ids} for s in kept
    ]


def _draw(
    request: dict[str, Any],
    client: int,
    samples: list[dict[str, list[int]]],
    round_index: int,
    micro: int,
) -> list[dict[str, list[int]]]:
    size = request["batch_size"]
    first = (round_index * request["accumulation"] + micro) * size
    sample_index = load("lesft_client.data:sample_index")
    return [
        samples[sample_index(request["seed"], client_name(client), position, len(samples))]
        for position in range(first, first + size)
    ]


if __name__ == "__main__":
    asked, answer = map(Path, sys.argv[1:])
    answer.write_text(json.dumps(drawn_samples(json.loads(asked.read_bytes()))))
