"""Cross-entropy fine-tuning by torch and peft alone, in one process: JSON in and JSON out.

It is what split training is measured against, so it is as quick as plain code gets: no padding,
logits only where target tokens are predicted, one forward and backward for each sample.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

Sample = dict[str, list[int]]


def train(request: dict[str, Any]) -> dict[str, Any]:
    """`seconds_by_round` and `loss_by_round`.

    `request` has `model`, `threads`, `lora` and `optimizer` as the run spec has them, and
    `windows`: for each round the samples of its micro-batches, one each.
    """
    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    model = _with_lora(request["model"], request["lora"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    spec = request["optimizer"]
    adamw = torch.optim.AdamW(
        parameters, lr=spec["learning_rate"], weight_decay=spec["weight_decay"]
    )
    seconds, losses = [], []
    for window in request["windows"]:
        start = time.monotonic()
        loss = 0.0
        for sample in window:
            part = _loss(model, sample) / len(window)
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        if spec["max_grad_norm"]:
            torch.nn.utils.clip_grad_norm_(parameters, spec["max_grad_norm"])
        adamw.step()
        adamw.zero_grad()
        seconds.append(time.monotonic() - start)
        losses.append(loss)
    return {"seconds_by_round": seconds, "loss_by_round": losses}


def _with_lora(folder: str, lora: dict[str, Any]) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=list(lora["target_modules"]),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config).train()


def _loss(model: Any, sample: Sample) -> torch.Tensor:
    """Mean cross-entropy over the target's tokens."""
    target = torch.tensor(sample["target"])
    ids = torch.tensor([sample["base"] + sample["target"]])
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(target) + 1).logits[0]
    return F.cross_entropy(logits[:-1], target)


if __name__ == "__main__":
    asked, answer = map(Path, sys.argv[1:])
    answer.write_text(json.dumps(train(json.loads(asked.read_bytes()))))
