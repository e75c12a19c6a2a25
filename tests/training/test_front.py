"""The front's half of the training step: what it sends, its dropout, and its two gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lesft.adapters import lora_parameters
from lesft.micro_batch import StepKey, StepResult
from lesft.spec import LossSpec, RunSpec
from lesft.split import front_forward
from lesft_client.front import Front
from tests.harness import make_front, random_samples, save_tiny_model
from tests.training.by_hand import run_spec

FIRST = StepKey(0, 0)
SAMPLES = random_samples(2)

DROPOUT: dict[str, Any] = {"lora": {"dropout": 0.5}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def trained_front(model: Path, spec: RunSpec, client_id: str = "ada") -> Front:
    """A front whose adapters are no longer zero, so that dropout shows."""
    front = make_front(model, spec, client_id)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(front.model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return front


def plain_activations(front: Front, sequences: list[list[int]]) -> torch.Tensor:
    """Each sequence alone, without dropout."""
    front.model.train(False)
    return torch.cat([front_forward(front.model, torch.tensor([ids]))[0] for ids in sequences])


def base_sequences() -> list[list[int]]:
    return [sample.base_ids + sample.target_ids for sample in SAMPLES]


def reference_sequences() -> list[list[int]]:
    return [sample.reference_ids + sample.target_ids for sample in SAMPLES]


# ---------------------------------------------------------------------- what is sent


def test_both_paths_and_the_targets_are_sent_sample_after_sample(model: Path) -> None:
    front = trained_front(model, run_spec())
    batch = front.forward(FIRST, SAMPLES).micro_batch
    assert batch.reference is not None
    assert batch.key == FIRST
    assert len({len(ids) for ids in base_sequences()}) == 2, "one of them is padded"
    for path, sequences in (
        (batch.base, base_sequences()),
        (batch.reference, reference_sequences()),
    ):
        assert path.lengths == tuple(len(ids) for ids in sequences)
        torch.testing.assert_close(
            path.activations_ND, plain_activations(front, sequences), rtol=1e-5, atol=1e-5
        )
        assert not path.activations_ND.requires_grad
    assert batch.targets.ids_T.tolist() == SAMPLES[0].target_ids + SAMPLES[1].target_ids
    assert batch.targets.lengths == tuple(len(sample.target_ids) for sample in SAMPLES)


def test_no_reference_path_is_computed_where_the_loss_needs_none(model: Path) -> None:
    front = trained_front(model, run_spec(loss=LossSpec(token_weights="uniform")))
    assert front.forward(FIRST, SAMPLES).micro_batch.reference is None


# ---------------------------------------------------------------------- dropout


def test_the_base_path_has_dropout_and_the_reference_path_has_not(model: Path) -> None:
    front = trained_front(model, run_spec(**DROPOUT))
    batch = front.forward(FIRST, SAMPLES).micro_batch
    assert batch.reference is not None
    without = plain_activations(front, base_sequences())
    assert (batch.base.activations_ND - without).abs().max() > 1e-3
    torch.testing.assert_close(
        batch.reference.activations_ND,
        plain_activations(front, reference_sequences()),
        rtol=1e-5,
        atol=1e-5,
    )


def test_dropout_is_a_function_of_seed_client_and_key(model: Path) -> None:
    spec = run_spec(**DROPOUT)

    def sent(client_id: str = "ada", key: StepKey = FIRST, seed: int = 7) -> torch.Tensor:
        front = trained_front(model, spec.model_copy(update={"seed": seed}), client_id)
        torch.seed()  # torch's own generator is somewhere else each time
        return front.forward(key, SAMPLES).micro_batch.base.activations_ND

    first = sent()
    assert torch.equal(first, sent())
    for other in (
        sent(client_id="ben"),
        sent(key=StepKey(0, 1)),
        sent(key=StepKey(1, 0)),
        sent(seed=8),
    ):
        assert (first - other).abs().max() > 1e-3


# ---------------------------------------------------------------------- backward


@pytest.mark.parametrize("reference_nll_weight", [0.0, 0.5])
def test_the_gradients_from_the_cut_go_on_into_the_adapters(
    model: Path, reference_nll_weight: float
) -> None:
    spec = run_spec(loss=LossSpec(reference_nll_weight=reference_nll_weight))
    front = trained_front(model, spec)
    sent = front.forward(FIRST, SAMPLES)
    assert sent.micro_batch.reference is not None
    generator = torch.Generator().manual_seed(2)
    base, reference = (
        torch.randn(path.activations_ND.shape, generator=generator)
        for path in (sent.micro_batch.base, sent.micro_batch.reference)
    )
    trained = reference if reference_nll_weight else None
    front.backward(sent, StepResult(FIRST, base, trained, 0.0, 0.0, None))

    twin = trained_front(model, spec)
    product = (plain_activations(twin, base_sequences()) * base).sum()
    if trained is not None:
        product = product + (plain_activations(twin, reference_sequences()) * trained).sum()
    product.backward()  # type: ignore[no-untyped-call]
    for parameter, expected in zip(
        lora_parameters(front.model), lora_parameters(twin.model), strict=True
    ):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-4)
        assert expected.grad is not None
        assert expected.grad.abs().max() > 1


def test_an_untrained_reference_path_keeps_no_graph(model: Path) -> None:
    front = trained_front(model, run_spec())
    assert front.forward(FIRST, SAMPLES).reference_ND is None
    front = trained_front(model, run_spec(loss=LossSpec(reference_nll_weight=0.5)))
    reference_ND = front.forward(FIRST, SAMPLES).reference_ND
    assert reference_ND is not None
    assert reference_ND.requires_grad
