"""The front as a device loads it: the same numbers as `load_front`'s, in less memory."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import PreTrainedModel

from lesft import device as device_module
from lesft.adapters import attach_lora, lora_parameters
from lesft.device import Precision, autocast, compute_dtype
from lesft.quantized_linear import QuantizedLinear
from lesft.spec import LoraSpec
from lesft.split import SUPPORTED_FAMILIES, checkpoint_gradients, front_forward
from lesft.tensor_file import TensorFile
from lesft.weights import Checkpoint, load_front, load_frugal_front
from tests.tiny_models import VOCAB_SIZE, mlp_modules, tiny_model

CPU = torch.device("cpu")
CUT = 2
IDS_BL = torch.tensor([[5, 9, 9, 96, 3, 40, 0, 7], [2, 2, 5, 61, 61, 8, 1, 0]])
every_family = pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
quantised = pytest.mark.parametrize("precision", ["int8", "int4"])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str], Checkpoint]:
    """Of a family's tiny model, stored in bfloat16."""

    def make(family: str) -> Checkpoint:
        tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path)
        return Checkpoint(tmp_path)

    return make


@pytest.fixture(autouse=True)
def _old_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 and int4 compute in float32, whatever this machine has."""
    monkeypatch.setattr(device_module, "_cpu_multiplies_bfloat16", lambda: False)


def with_lora(front: PreTrainedModel, family: str) -> PreTrainedModel:
    attach_lora(front, LoraSpec(target_modules=mlp_modules(family), dropout=0.1), 1, 0)
    for parameter in lora_parameters(front):  # B is zero at first, and A then without gradient
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    return front


def step(front: PreTrainedModel, precision: Precision) -> list[torch.Tensor]:
    """Activations and the adapters' gradients of one step."""
    front.train()
    torch.manual_seed(3)
    with autocast(CPU, precision):
        hidden_BLD = front_forward(front, IDS_BL)
    hidden_BLD.float().pow(2).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in lora_parameters(front)]
    return [hidden_BLD.detach(), *(gradient for gradient in gradients if gradient is not None)]


@every_family
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_in_fp32_and_bf16_a_step_is_that_of_a_front_held_whole_to_the_last_bit(
    checkpoint: Callable[[str], Checkpoint], family: str, precision: Literal["fp32", "bf16"]
) -> None:
    files = checkpoint(family)
    whole = load_front(files, CUT, compute_dtype(precision, CPU), CPU)
    frugal = load_frugal_front(files, CUT, precision, CPU)
    expected = step(with_lora(whole, family), precision)
    found = step(with_lora(frugal, family), precision)
    assert frugal.device == CPU
    assert len(expected) == 1 + CUT * 2 * len(mlp_modules(family))
    assert [f.dtype for f in found] == [e.dtype for e in expected]
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("family", "precision"),
    [*((family, "int8") for family in SUPPORTED_FAMILIES), ("gemma2", "int4"), ("phi3", "int4")],
)
def test_a_quantised_step_is_that_of_a_plain_front_with_the_weights_it_means(
    checkpoint: Callable[[str], Checkpoint], family: str, precision: Precision
) -> None:
    files = checkpoint(family)
    frugal = load_frugal_front(files, CUT, precision, CPU)
    plain = load_front(files, CUT, torch.float32, CPU)
    names = [n for n, m in frugal.named_modules() if isinstance(m, QuantizedLinear)]
    linear = [n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)]
    assert names == linear != []
    for name in names:
        layer, weight = frugal.get_submodule(name), plain.get_parameter(f"{name}.weight")
        assert isinstance(layer, QuantizedLinear)
        rows = torch.cat([block for _, block in layer.blocks(torch.float32)])
        error = (rows - weight).norm() / weight.norm()
        assert 0 < error < (0.01 if precision == "int8" else 0.15)
        weight.data = rows
    found = step(with_lora(frugal, family), precision)
    expected = step(with_lora(plain, family), "fp32")
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@quantised
def test_checkpointed_gradients_of_a_quantised_front_are_the_same_bits(
    checkpoint: Callable[[str], Checkpoint], precision: Precision
) -> None:
    files = checkpoint("qwen2")
    kept = with_lora(load_frugal_front(files, CUT, precision, CPU), "qwen2")
    again = with_lora(load_frugal_front(files, CUT, precision, CPU), "qwen2")
    checkpoint_gradients(again)
    for one, other in zip(step(kept, precision), step(again, precision), strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------------- what is held


def mapped_file(tensor: torch.Tensor) -> str:
    """The file whose pages a tensor's memory is; empty where it is none's."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5) if line.count(" ") > 5 else [line.split()[0], ""]
        start, stop = (int(end, 16) for end in span.split("-"))
        if start <= tensor.data_ptr() < stop:
            return os.path.basename(path.strip())
    return ""


def test_weights_that_are_computed_with_as_stored_are_the_files_own_pages(
    checkpoint: Callable[[str], Checkpoint],
) -> None:
    files = checkpoint("llama")
    in_bf16 = load_frugal_front(files, CUT, "bf16", CPU)
    in_fp32 = load_frugal_front(files, CUT, "fp32", CPU)
    assert {mapped_file(p) for p in in_bf16.parameters()} == {"model.safetensors"}
    assert "model.safetensors" not in {mapped_file(p) for p in in_fp32.parameters()}


def test_of_the_embedding_only_the_rows_in_use_are_read_each_once(
    checkpoint: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    front = load_frugal_front(checkpoint("gemma2"), CUT, "bf16", CPU)
    rows: list[int] = []
    read_rows = TensorFile.read_rows

    def recorded(file: TensorFile, name: str, start: int, stop: int) -> torch.Tensor:
        assert (name, stop) == ("model.embed_tokens.weight", start + 1)
        rows.append(start)
        return read_rows(file, name, start, stop)

    monkeypatch.setattr(TensorFile, "read_rows", recorded)
    front_forward(front, IDS_BL)
    assert rows == sorted(set(IDS_BL.flatten().tolist()))
    assert not any(VOCAB_SIZE in tensor.shape for tensor in front.state_dict().values())
    assert not hasattr(front.get_input_embeddings().embedding, "weight")


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE])
def test_a_token_that_the_table_lacks_is_an_error_as_with_torch(
    checkpoint: Callable[[str], Checkpoint], token_id: int
) -> None:
    front = load_frugal_front(checkpoint("llama"), CUT, "fp32", CPU)
    with pytest.raises(IndexError, match=r"^index out of range in self$"):
        front_forward(front, torch.tensor([[3, token_id]]))
