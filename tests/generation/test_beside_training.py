"""Texts that are written in the midst of a training run change nothing of the run."""

from pathlib import Path

import pytest
import torch

from lesft.micro_batch import StepKey, StepResult
from lesft.sampling import Sampling
from lesft_client.language_model import LanguageModel
from tests.generation.harness import (
    all_written,
    prompts,
    save_family,
    whole_model,
    whole_tokens,
    with_model,
)
from tests.harness import random_samples, running_server, server_settings
from tests.server.harness import Crew, train_to_the_end

MOST = 6
ASKED = prompts(2, seed=8)
DRAWN = Sampling(temperature=0.9, seed=3)

Texts = tuple[list[list[int]], list[list[int]]]


async def texts_of(model: LanguageModel) -> Texts:
    """The likeliest texts, and drawn ones."""
    likeliest = await all_written(model, ASKED, MOST)
    return likeliest, await all_written(model, ASKED, MOST, DRAWN)


def test_a_run_with_texts_between_its_micro_batches_ends_as_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_family(tmp_path / "model", "llama")

    def adapters_and_lineage(state: Path) -> tuple[dict[str, torch.Tensor], str]:
        settings = server_settings(
            folder,
            state,
            clients=2,
            accumulation=2,
            threads=1,
            lora={"dropout": 0.2},  # which must be off for the texts, and on again after them
            optimizer={"learning_rate": 0.05},
        )
        samples = [random_samples(4), random_samples(4, seed=1)]
        with running_server(settings) as server:
            return train_to_the_end(server, folder, samples), server.engine.run.lineage

    undisturbed, lineage = adapters_and_lineage(tmp_path / "without")

    texts: list[Texts] = []
    take_step = Crew._step

    def step_and_write(crew: Crew, key: StepKey) -> list[StepResult]:
        results = take_step(crew, key)
        texts.append(with_model(texts_of, folder, server=crew._server.grpc, untuned=True))
        return results

    monkeypatch.setattr(Crew, "_step", step_and_write)
    disturbed, other_lineage = adapters_and_lineage(tmp_path / "with")

    assert other_lineage == lineage
    assert disturbed.keys() == undisturbed.keys()
    assert [n for n in undisturbed if not torch.equal(disturbed[n], undisturbed[n])] == []
    assert all(bool(t.any()) for name, t in undisturbed.items() if ".lora_B." in name)
    # And the untuned model stayed what it is while the adapters were trained.
    whole = whole_model(folder)
    likeliest = [whole_tokens(whole, prompt, MOST) for prompt in ASKED]
    assert [of_likeliest for of_likeliest, _ in texts] == [likeliest] * 4
    assert [drawn for _, drawn in texts] == [texts[0][1]] * 4
