"""Invariant 1: split training over gRPC is the same mathematics as whole training."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lesft.adapters import lora_config, lora_state
from lesft.spec import LossSpec, RunSpec
from lesft_client.data import EncodedSample, sample_index
from lesft_client.front import Front
from tests.harness import (
    RunningServer,
    back_model,
    make_front,
    random_samples,
    running_server,
    save_tiny_model,
    server_settings,
    train_clients,
)

ROUNDS = 5
ACCUMULATION = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def whole_peft_model(
    model: Path, initial: dict[str, torch.Tensor], spec: RunSpec
) -> PreTrainedModel:
    """The model in one piece with peft's own wrapper, starting from the same adapter."""
    from peft import get_peft_model

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peft_model = get_peft_model(whole, lora_config(spec.lora))
    parameters = dict(peft_model.named_parameters())
    with torch.no_grad():
        for name, value in initial.items():
            stem, _, suffix = name.rpartition(".weight")
            parameters[f"base_model.model.{stem}.default.weight{suffix}"].copy_(value)
    return peft_model


def adapter_of(peft_model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter.detach()
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad
    }


def target_logits(model: PreTrainedModel, prompt: list[int], target: list[int]) -> torch.Tensor:
    """Logits where the target tokens are predicted; the library computes the head only there."""
    predictors = torch.arange(len(prompt) - 1, len(prompt) + len(target) - 1)
    output = model(input_ids=torch.tensor([prompt + target]), logits_to_keep=predictors)
    return output.logits[0]


def equation_17(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss with all weights one, as METHOD writes it."""
    log_probs = torch.log_softmax(logits, dim=-1)[torch.arange(len(targets)), targets]
    return -log_probs.sum() / len(targets)


def plain_loop(
    peft_model: PreTrainedModel,
    samples: Sequence[EncodedSample],
    spec: RunSpec,
    loss_function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> list[float]:
    """Training as anyone would write it with peft and torch."""
    named = sorted((n, p) for n, p in peft_model.named_parameters() if p.requires_grad)
    # The two sides of a split clip their own gradients; so does this loop, part by part.
    front = [p for n, p in named if is_front(n, spec)]
    back = [p for n, p in named if not is_front(n, spec)]
    adamw = torch.optim.AdamW([*front, *back], lr=spec.optimizer.learning_rate, weight_decay=0.0)
    losses = []
    position = 0
    for _ in range(spec.rounds):
        window = []
        for _ in range(spec.accumulation):
            sample = samples[sample_index(spec.seed, "client-0", position, len(samples))]
            position += 1
            logits = target_logits(peft_model, sample.base_ids, sample.target_ids)
            loss = loss_function(logits, torch.tensor(sample.target_ids))
            (loss / spec.accumulation).backward()
            window.append(loss.item())
        for part in (front, back):
            torch.nn.utils.clip_grad_norm_(part, spec.optimizer.max_grad_norm)
        adamw.step()
        adamw.zero_grad()
        losses.append(sum(window) / len(window))
    return losses


def is_front(name: str, spec: RunSpec) -> bool:
    return any(f".layers.{index}." in name for index in range(spec.cut_layer))


@pytest.mark.parametrize("in_flight", [0, 1])
def test_one_client_over_grpc_equals_a_plain_peft_loop_bit_for_bit(
    model: Path, tmp_path: Path, in_flight: int
) -> None:
    settings = server_settings(
        model,
        tmp_path,
        rounds=ROUNDS,
        accumulation=ACCUMULATION,
        aggregation_interval=2,
        loss=LossSpec(token_weights="uniform"),
    )
    samples = random_samples(6)
    with running_server(settings) as server:
        initial = whole_adapter(server, make_front(model, server.spec, "client-0"))
        [(front, status)] = train_clients(server, model, [samples], in_flight)
        trained = whole_adapter(server, front)

    whole = whole_peft_model(model, initial, server.spec)
    losses = plain_loop(whole, samples, server.spec, equation_17)
    assert status.loss_by_round == losses
    assert_identical(trained, adapter_of(whole))
    assert all(not torch.equal(trained[name], initial[name]) for name in trained)

    # The library's own cross-entropy sums in another order: the same adapters, and losses that
    # differ in their last bit.
    whole = whole_peft_model(model, initial, server.spec)
    losses = plain_loop(whole, samples, server.spec, torch.nn.functional.cross_entropy)
    assert status.loss_by_round == pytest.approx(losses, rel=3e-7)
    assert_identical(trained, adapter_of(whole))


def whole_adapter(server: RunningServer, front: Front) -> dict[str, torch.Tensor]:
    return {**front.adapter(), **lora_state(back_model(server), server.spec.cut_layer)}


def assert_identical(trained: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert trained.keys() == expected.keys()
    assert [name for name in trained if not torch.equal(trained[name], expected[name])] == []
