"""Split decoding over a real socket equals the library's own `generate`, token for token."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lesft.adapter_halves import (
    ADAPTER_FILE,
    SPEC_FILE,
    AdapterHalf,
    HalfInfo,
    load_half,
    save_half,
)
from lesft.errors import HandshakeMismatch, InvalidInput, ModelError
from lesft.inference_messages import MAX_STEP_TOKENS
from lesft.sampling import GREEDY, Sampling
from lesft.split import SUPPORTED_FAMILIES
from lesft_client.export import export
from lesft_client.language_model import LanguageModel
from lesft_client.open_model import open_model
from lesft_client.settings import ExportSettings, GenerateSettings
from lesft_client.split_sequence import SplitSequence
from lesft_testbed.proxy import FaultProxy
from tests.generation.harness import (
    all_written,
    prompts,
    save_family,
    whole_model,
    whole_tokens,
    with_model,
    written,
)
from tests.harness import RunningServer, random_samples, running_server, server_settings
from tests.server.harness import Crew
from tests.tiny_models import mlp_modules

MOST = 24
REPEATING = [5, 6, 7, 8, 9, 10, 11, 12] * 4
"""A prompt that prompt lookup finds guesses in."""


@dataclass
class Served:
    """A server, its model's folder, and the same model in one piece."""

    server: RunningServer
    folder: Path
    whole: PreTrainedModel

    def run(self, work: Any, **settings: Any) -> Any:
        values = {"server": self.server.grpc, "untuned": True, **settings}
        return with_model(work, self.folder, **values)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = save_family(tmp_path_factory.mktemp("model"), "llama")
    settings = server_settings(folder, tmp_path_factory.mktemp("server"), max_context=200)
    with running_server(settings) as server:
        yield Served(server, folder, whole_model(folder))


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_every_family_writes_what_it_writes_in_one_piece(family: str, tmp_path: Path) -> None:
    folder = save_family(tmp_path / "model", family)
    asked = [*prompts(3), REPEATING]
    whole = whole_model(folder)
    expected = [whole_tokens(whole, prompt, MOST) for prompt in asked]

    async def work(model: LanguageModel) -> Any:
        alone = [await written(model, prompt, MOST) for prompt in asked]
        return alone, await all_written(model, asked, MOST)

    lora = {"target_modules": mlp_modules(family)}
    with running_server(server_settings(folder, tmp_path / "server", lora=lora)) as server:
        where: dict[str, Any] = {"server": server.grpc, "untuned": True}
        plain = with_model(work, folder, speculate=0, **where)
        guessed = with_model(work, folder, speculate=5, **where)
    assert plain == (expected, expected)
    assert guessed == (expected, expected)


def test_eight_texts_at_once_are_what_they_are_one_by_one(served: Served) -> None:
    asked = prompts(8, seed=1)
    expected = [whole_tokens(served.whole, prompt, MOST) for prompt in asked]
    before = served.server.engine.run.rounds
    assert served.run(lambda model: all_written(model, asked, MOST)) == expected
    assert served.server.engine.run.rounds == before


def test_guesses_save_round_trips_and_change_nothing(served: Served) -> None:
    async def work(model: Any) -> tuple[list[int], int]:
        return await written(model, REPEATING, 60), model.round_trips

    plain, round_trips = served.run(work, speculate=0)
    guessed, fewer = served.run(work, speculate=8)
    assert plain == guessed == whole_tokens(served.whole, REPEATING, 60)
    assert round_trips == len(plain)
    assert fewer < 0.75 * round_trips  # a random model soon repeats itself


@pytest.mark.parametrize("speculate", [0, 6])
def test_a_cut_link_does_not_change_the_text(served: Served, speculate: int) -> None:
    asked = [REPEATING, *prompts(3, seed=2)]
    expected = [whole_tokens(served.whole, prompt, MOST) for prompt in asked]
    proxy = FaultProxy(served.server.grpc)

    async def work(model: LanguageModel) -> Any:
        async def cut() -> None:
            for _ in range(3):
                await asyncio.sleep(0.1)
                await asyncio.to_thread(proxy.cut, 0.05)

        texts, _ = await asyncio.gather(all_written(model, asked, MOST), cut())
        return texts

    try:
        texts = served.run(work, server=proxy.address, speculate=speculate)
        assert proxy.counts().connections > 1
    finally:
        proxy.close()
    assert texts == expected


# ---------------------------------------------------------------------- sampling


@pytest.mark.parametrize("total", [MAX_STEP_TOKENS - 4, MAX_STEP_TOKENS])
def test_a_text_of_any_length_goes_on_over_another_stream(
    served: Served, tmp_path: Path, total: int
) -> None:
    """All of it is sent again, in pieces; what the guesses are asked about must be in the last."""
    guesses = [7] * 8

    async def work(model: Any) -> None:
        sequence = SplitSequence(model._context, [5] * (total - 1), total + 20, GREEDY)
        try:
            sequence.token_ids += await sequence.next_tokens([])
            undisturbed = await sequence.next_tokens(guesses)
            sequence._stream.close()
            assert await sequence.next_tokens(guesses) == undisturbed
        finally:
            sequence.close()

    settings = server_settings(served.folder, tmp_path, max_context=2 * MAX_STEP_TOKENS)
    with running_server(settings) as server:
        with_model(work, served.folder, server=server.grpc, untuned=True)


def test_a_seed_gives_the_same_text_alone_among_others_and_with_guesses(served: Served) -> None:
    sampling = Sampling(temperature=0.8, top_p=0.9, top_k=50, seed=11)

    async def work(model: LanguageModel) -> Any:
        alone = await written(model, REPEATING, MOST, sampling)
        others = await all_written(model, [*prompts(3), REPEATING], MOST, sampling)
        return alone, others[-1]

    alone, among_others = served.run(work)
    guessed, _ = served.run(work, speculate=6)
    assert alone == among_others == guessed
    assert alone != whole_tokens(served.whole, REPEATING, MOST)
    other_seed = sampling.model_copy(update={"seed": 12})
    assert served.run(lambda m: written(m, REPEATING, MOST, other_seed)) != alone


@pytest.mark.parametrize("speculate", [0, 6])
def test_the_repetition_penalty_is_the_librarys_and_sees_the_prompt(
    served: Served, speculate: int
) -> None:
    sampling = Sampling(repetition_penalty=1.3)
    expected = whole_tokens(served.whole, REPEATING, MOST, repetition_penalty=1.3)
    assert expected != whole_tokens(served.whole, REPEATING, MOST)
    got = served.run(lambda m: written(m, REPEATING, MOST, sampling), speculate=speculate)
    assert got == expected


# ---------------------------------------------------------------------- scores


def test_scores_are_the_whole_models_log_probabilities(served: Served) -> None:
    prompt = prompts(1, seed=3)[0]
    likeliest = whole_tokens(served.whole, prompt, 3, min_new_tokens=3)
    continuations = [[7], likeliest, [9, 10, 11, 12, 13], likeliest[:1]]
    got = served.run(lambda model: model.score(prompt, continuations))
    for ids, score in zip(continuations, got, strict=True):
        with torch.no_grad():
            logits = served.whole(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        log_probs = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])
        assert score.log_prob == pytest.approx(float(log_probs.sum()), abs=1e-4)
    assert [score.is_greedy for score in got] == [False, True, False, True]
    local = with_model(lambda model: model.score(prompt, continuations), served.folder, local=True)
    assert [s.is_greedy for s in local] == [s.is_greedy for s in got]
    assert [s.log_prob for s in local] == pytest.approx([s.log_prob for s in got], abs=1e-4)


# ---------------------------------------------------------------------- the whole model here


def test_the_local_model_writes_the_same_alone_and_together(served: Served) -> None:
    asked = [*prompts(5, seed=4), REPEATING]
    expected = [whole_tokens(served.whole, prompt, MOST) for prompt in asked]

    async def work(model: LanguageModel) -> Any:
        return [await written(model, p, MOST) for p in asked], await all_written(model, asked, MOST)

    assert with_model(work, served.folder, local=True) == (expected, expected)


# ---------------------------------------------------------------------- the fine-tuned model


@dataclass
class Tuned(Served):
    state: Path
    """The client's, after a run of two rounds."""


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuned]:
    folder = save_family(tmp_path_factory.mktemp("model"), "llama")
    state = tmp_path_factory.mktemp("client")
    settings = server_settings(
        folder, tmp_path_factory.mktemp("server"), optimizer={"learning_rate": 0.05}
    )
    with running_server(settings) as server:
        with Crew(server, folder, [random_samples(4)]) as crew:
            for round_index in range(server.spec.rounds):
                crew.train_round(round_index)
            crew.leave()
        info = HalfInfo.of(server.spec, "front", server.spec.rounds)
        save_half(state / ADAPTER_FILE, AdapterHalf(info, crew.fronts[0].adapter()))
        (state / SPEC_FILE).write_text(server.spec.model_dump_json())
        yield Tuned(server, folder, whole_model(folder), state)


def test_the_fine_tuned_model_writes_what_its_joined_adapter_writes(
    tuned: Tuned, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    back = tuned.server.server._settings.state
    export(ExportSettings(state=tuned.state, back=back, model=str(tuned.folder), output=adapter))
    asked = prompts(4, seed=5)

    async def work(model: LanguageModel) -> Any:
        return await all_written(model, asked, MOST)

    split = tuned.run(work, untuned=False, state=tuned.state)
    assert split == with_model(work, tuned.folder, local=True, adapter=adapter)
    untuned = tuned.run(work)
    assert untuned == [whole_tokens(tuned.whole, prompt, MOST) for prompt in asked]
    assert untuned != split


def test_another_adapter_of_the_same_run_and_round_is_another_model(
    tuned: Tuned, tmp_path: Path
) -> None:
    """One trained anew on better data has the same settings, and so has another client's own."""

    async def fingerprint(model: LanguageModel) -> Any:
        return model.fingerprint

    half = load_half(tuned.state)
    other = {name: tensor + 1 for name, tensor in half.tensors.items()}
    save_half(tmp_path / ADAPTER_FILE, AdapterHalf(half.info, other))
    mine = tuned.run(fingerprint, untuned=False, state=tuned.state)
    assert tuned.run(fingerprint, untuned=False, state=tuned.state) == mine
    assert tuned.run(fingerprint, untuned=False, state=tmp_path) != mine
    save_half(tmp_path / ADAPTER_FILE, half)
    assert tuned.run(fingerprint, untuned=False, state=tmp_path) == mine
    (tmp_path / "instance").write_text("trained on other samples")
    assert tuned.run(fingerprint, untuned=False, state=tmp_path) != mine


def test_tuned_and_untuned_texts_can_be_written_at_the_same_time(tuned: Tuned) -> None:
    asked = prompts(4, seed=5)

    async def both() -> Any:
        shared: dict[str, Any] = {
            "model": str(tuned.folder),
            "server": tuned.server.grpc,
            "threads": 1,
        }
        async with (
            open_model(GenerateSettings(**shared, untuned=True)) as untuned,
            open_model(GenerateSettings(**shared, state=tuned.state)) as fine_tuned,
        ):
            return await asyncio.gather(
                all_written(untuned, asked, MOST), all_written(fine_tuned, asked, MOST)
            )

    untuned, fine_tuned = asyncio.run(both())
    assert untuned == tuned.run(lambda m: all_written(m, asked, MOST))
    assert fine_tuned == tuned.run(
        lambda m: all_written(m, asked, MOST), untuned=False, state=tuned.state
    )


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"server": ""}, InvalidInput, "--server HOST:PORT is needed, or --local"),
        ({"untuned": False}, InvalidInput, "give the --state of lesft-client train"),
        ({"adapter": Path("x")}, InvalidInput, "--adapter is for --local"),
        ({"local": True}, InvalidInput, "--local runs the whole model here, without --server"),
        (
            {"server": "", "local": True, "precision": "int4"},
            InvalidInput,
            "--precision int4 is for the front of a split model: with --local, take bf16",
        ),
        (
            {"server": "", "local": True, "adapter": Path("x")},
            InvalidInput,
            "--untuned and --adapter contradict each other",
        ),
        (
            {"server": "", "local": True, "untuned": False, "adapter": Path("/nowhere")},
            ModelError,
            "--adapter /nowhere: is no PEFT adapter of this model",
        ),
    ],
)
def test_settings_that_mean_no_model_are_refused(
    served: Served, settings: dict[str, Any], kind: type[Exception], message: str
) -> None:
    async def work(model: LanguageModel) -> None:
        raise AssertionError("it was opened")

    with pytest.raises(kind, match=message):
        served.run(work, **settings)


def test_an_adapter_of_another_run_or_round_is_refused(tuned: Tuned, tmp_path: Path) -> None:
    half = load_half(tuned.state / ADAPTER_FILE)
    for field, value in [("rounds", 1), ("spec_fingerprint", "sha256:" + "0" * 64)]:
        info = half.info.model_copy(update={field: value})
        save_half(tmp_path / ADAPTER_FILE, AdapterHalf(info, half.tensors))
        with pytest.raises(HandshakeMismatch, match=f"{field}: server .*, client {value}"):
            tuned.run(lambda m: written(m, [5], 3), untuned=False, state=tmp_path)


def test_what_does_not_fit_is_refused(served: Served) -> None:
    # The model has 256, but its server takes only 200.
    with pytest.raises(InvalidInput, match="may have 200 tokens together, but the prompt has 190"):
        served.run(lambda m: written(m, [5] * 190, 11))
    with pytest.raises(InvalidInput, match=r"256 tokens together, .* the prompt has 250 and 7"):
        with_model(lambda m: written(m, [5] * 250, 7), served.folder, local=True)
    with pytest.raises(InvalidInput, match="at least one token"):
        served.run(lambda m: written(m, [], 3))
    with pytest.raises(InvalidInput, match="token 300, but the model knows 300 tokens only"):
        served.run(lambda m: written(m, [300], 3))
