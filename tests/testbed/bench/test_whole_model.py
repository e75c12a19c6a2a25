"""The plain loop that split training is measured against does what it says."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lesft_testbed.bench.whole_model import train
from tests.tiny_models import save_tiny_model

WINDOW = [
    {"base": [5, 6, 7], "target": [8, 9]},
    {"base": [11, 12], "target": [13, 14, 15]},
]


def request(model: Path, learning_rate: float) -> dict[str, object]:
    return {
        "model": str(model),
        "threads": 1,
        "lora": {
            "rank": 2,
            "alpha": 4,
            "dropout": 0.0,
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
        },
        "optimizer": {"learning_rate": learning_rate, "weight_decay": 0.0, "max_grad_norm": 1.0},
        "windows": [WINDOW, WINDOW, WINDOW],
    }


def plain_loss(model: Path) -> float:
    """Mean over samples of the mean -log P of their target tokens, all logits computed."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    losses = []
    for sample in WINDOW:
        ids = torch.tensor([sample["base"] + sample["target"]])
        with torch.no_grad():
            log_probs = torch.log_softmax(whole(input_ids=ids).logits[0], dim=-1)
        positions = range(len(sample["base"]), ids.shape[1])
        nll = [-float(log_probs[p - 1, ids[0, p]]) for p in positions]
        losses.append(sum(nll) / len(nll))
    return sum(losses) / len(losses)


def test_it_begins_with_the_models_own_loss_and_learns(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    done = train(request(tmp_path, learning_rate=0.05))
    losses = done["loss_by_round"]
    assert abs(losses[0] - plain_loss(tmp_path)) < 1e-5
    assert losses[2] < losses[0] - 0.05
    assert len(done["seconds_by_round"]) == 3
    assert min(done["seconds_by_round"]) > 0
