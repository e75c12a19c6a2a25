"""Halves of a made-up finished run, and the state folders that hold them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lesft.adapter_halves import ADAPTER_FILE, SPEC_FILE, AdapterHalf, HalfInfo, save_half
from lesft.adapters import attach_lora, load_lora_state, lora_state
from lesft.spec import LoraSpec, RunSpec
from lesft.split import back_hidden, front_forward, head_logits
from lesft.weights import Checkpoint, front_fingerprint, load_back, load_front
from tests.processes.harness import save_model_with_tokenizer
from tests.tiny_models import mlp_modules, save_tiny_model

CPU = torch.device("cpu")
IDS_BL = torch.arange(3, 18).unsqueeze(0)
ROUNDS = 9
RESULT: dict[str, Any] = {
    "num_samples": 12,
    "rounds": ROUNDS,
    "loss_by_round": [None, 2.5, *[1.0] * 6, 0.5],
    "held_out_before": {"nll_sum": 30.0, "tokens": 20},
    "held_out_after": {"nll_sum": 10.0, "tokens": 20},
    "bytes_up": 3_000_000,
    "bytes_down": 1_500_000,
}


def save_base(folder: Path, family: str, tokenizer: Path | None = None) -> Path:
    """A tiny base model, with the tokenizer of another folder."""
    save_tiny_model(folder, family)
    for file in tokenizer.glob("tokenizer*") if tokenizer else []:
        shutil.copy(file, folder)
    return folder


def tokenizer_of(folder: Path) -> Path:
    """A folder with a tokenizer."""
    return save_model_with_tokenizer(folder)


class SplitModel:
    """Front and back with random adapters, of a run that nobody has trained."""

    def __init__(self, base: Path, family: str = "llama", cut_layer: int = 1, **spec: Any) -> None:
        checkpoint = Checkpoint(base)
        lora = LoraSpec(rank=3, alpha=12, target_modules=mlp_modules(family))
        values: dict[str, Any] = {
            "rounds": ROUNDS,
            "clients": 2,
            "lora": lora,
            "model_name": base.name,
            "cut_layer": cut_layer,
            "front_fingerprint": front_fingerprint(checkpoint, cut_layer),
        }
        self.spec = RunSpec(**{**values, **spec})
        self._front = load_front(checkpoint, cut_layer, torch.float32, CPU)
        self._back = load_back(checkpoint, cut_layer, torch.float32, CPU)
        self.front = self._half(self._front, "front", 0)
        self.back = self._half(self._back, "back", cut_layer)

    def _half(self, model: PreTrainedModel, side: Any, offset: int) -> AdapterHalf:
        attach_lora(model, self.spec.lora, 0, offset)
        generator = torch.Generator().manual_seed(offset)
        state = {
            name: torch.randn(tensor.shape, generator=generator) * 0.1
            for name, tensor in lora_state(model, offset).items()
        }
        load_lora_state(model, offset, state)
        return AdapterHalf(HalfInfo.of(self.spec, side, ROUNDS), state)

    @torch.no_grad()
    def logits_LV(self) -> torch.Tensor:
        """What both parts together say."""
        activations = front_forward(self._front, IDS_BL)
        return head_logits(self._back, back_hidden(self._back, activations)[0])

    def save(self, folder: Path) -> tuple[Path, Path]:
        """The state folders of a client and of the server."""
        client, server = folder / "client", folder / "server"
        save_half(client / ADAPTER_FILE, self.front)
        save_half(server / ADAPTER_FILE, self.back)
        (client / SPEC_FILE).write_text(self.spec.model_dump_json())
        (client / "result.json").write_text(json.dumps(RESULT))
        return client, server


def with_info(half: AdapterHalf, **changes: Any) -> AdapterHalf:
    """A half that says something else of itself."""
    return replace(half, info=half.info.model_copy(update=changes))


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    """What a whole model says."""
    logits: torch.Tensor = model(input_ids=IDS_BL, use_cache=False).logits[0]
    return logits
