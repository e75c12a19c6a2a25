"""Layers computed again in the backward pass: less is kept, and not a bit is different."""

from pathlib import Path

import pytest
import torch

import tests.harness
from lesft.adapters import lora_parameters, lora_state
from lesft.micro_batch import StepKey, StepResult
from lesft.spec import RunSpec
from lesft.split import SUPPORTED_FAMILIES, checkpoint_gradients
from lesft_client.front import Front
from tests.harness import (
    back_model,
    make_front,
    random_samples,
    running_server,
    save_tiny_model,
    server_settings,
    train_clients,
)
from tests.tiny_models import mlp_modules
from tests.training.by_hand import run_spec

DROPOUT = {"lora": {"dropout": 0.3}}


def gradients_and_kept_bytes(front: Front) -> tuple[list[torch.Tensor], int]:
    """Of two micro-batches in flight; the bytes are those kept for the backward pass."""
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        sent = [front.forward(StepKey(0, micro), random_samples(3, micro)) for micro in (0, 1)]
    for each in sent:
        batch = each.micro_batch
        gradient_ND = torch.cos(batch.base.activations_ND)
        front.backward(each, StepResult(batch.key, gradient_ND, None, 0.0, 0.0, None))
    gradients = [parameter.grad for parameter in lora_parameters(front.model)]
    return [gradient for gradient in gradients if gradient is not None], kept


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_every_family_keeps_less_and_gets_the_same_gradients(family: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, family)
    lora = {**DROPOUT["lora"], "target_modules": (*mlp_modules(family), "o_proj")}
    plain, checkpointed = (make_front(tmp_path, run_spec(lora=lora), "a") for _ in range(2))
    checkpoint_gradients(checkpointed.model)
    expected, all_bytes = gradients_and_kept_bytes(plain)
    gradients, kept_bytes = gradients_and_kept_bytes(checkpointed)
    assert kept_bytes < 0.5 * all_bytes
    assert len(gradients) == len(expected) > 0
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))


def train(model: Path, state: Path, checkpointing: bool) -> dict[str, torch.Tensor]:
    settings = server_settings(
        model,
        state,
        rounds=3,
        accumulation=2,
        threads=1,
        gradient_checkpointing=checkpointing,
        **DROPOUT,
    )
    with running_server(settings) as server:
        # One micro-batch at a time: both ends draw dropout from the one generator of this process.
        [(front, _)] = train_clients(server, model, [random_samples(4)], in_flight=1)
        assert back_model(server).is_gradient_checkpointing is checkpointing
        return lora_state(back_model(server), server.spec.cut_layer) | front.adapter()


def test_a_run_with_it_on_both_sides_ends_in_the_same_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_model(tmp_path / "model")
    expected = train(model, tmp_path / "plain", checkpointing=False)

    def make_checkpointed(folder: Path, spec: RunSpec, client_id: str) -> Front:
        front = make_front(folder, spec, client_id)
        checkpoint_gradients(front.model)
        return front

    monkeypatch.setattr(tests.harness, "make_front", make_checkpointed)
    adapters = train(model, tmp_path / "checkpointed", checkpointing=True)
    assert adapters.keys() == expected.keys()
    assert all(torch.equal(adapters[name], expected[name]) for name in expected)
