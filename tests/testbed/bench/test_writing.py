"""Texts by the library from the whole model, and by a client of a server: the same ones."""

from pathlib import Path
from typing import Any

import pytest

from lesft.adapter_export import export_adapter
from lesft.adapter_halves import (
    ADAPTER_FILE,
    SPEC_FILE,
    AdapterHalf,
    HalfInfo,
    load_half,
    save_half,
)
from lesft_testbed.bench import decode
from lesft_testbed.bench.part import Bench
from lesft_testbed.bench.settings import BenchSettings
from lesft_testbed.bench.writing import written
from tests.harness import random_samples, running_server, server_settings, train_clients
from tests.processes.harness import save_model_with_tokenizer

TOKENS = 12


def test_whole_and_split_one_by_one_with_guesses_and_at_once_write_the_same(
    tmp_path: Path,
) -> None:
    model, state = save_model_with_tokenizer(tmp_path / "model"), tmp_path / "client"
    settings = server_settings(
        model, tmp_path / "server", rounds=1, optimizer={"learning_rate": 0.05}
    )
    with running_server(settings) as server:
        [(front, _)] = train_clients(server, model, [random_samples(4)])
        half = AdapterHalf(HalfInfo.of(server.spec, "front", 1), front.adapter())
        save_half(state / ADAPTER_FILE, half)
        (state / SPEC_FILE).write_text(server.spec.model_dump_json())
        export_adapter(
            tmp_path / "adapter", half, load_half(settings.state), server.spec, str(model)
        )

        def texts(**way: Any) -> dict[str, Any]:
            prompts = ["Add 1 and 4.", "Add 1 and 4. Add 1 and 4. Add"]
            request = {"model": str(model), "threads": 1, "prompts": prompts, "tokens": TOKENS}
            return written({**request, **way})

        whole = texts(adapter=str(tmp_path / "adapter"))
        split = {"server": server.grpc, "state": str(state)}
        plain = texts(**split, guesses=0, at_once=False)
        guessed = texts(**split, guesses=8, at_once=False)
        together = texts(**split, guesses=0, at_once=True)
    num_tokens = sum(map(len, whole["texts"]))
    assert num_tokens > 4
    assert plain["texts"] == guessed["texts"] == together["texts"] == whole["texts"]
    assert whole["round_trips"] == plain["round_trips"] == together["round_trips"] == num_tokens
    assert guessed["round_trips"] <= num_tokens
    assert min(each["seconds"] for each in (whole, plain, guessed, together)) > 0


def test_speed_is_of_all_tokens_and_texts_are_compared_with_those_written_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(
        [
            {"texts": [[1, 2, 3], [4, 5, 6]], "seconds": 3.0, "round_trips": 6},
            {"texts": [[1, 2, 3], [4, 5, 7]], "seconds": 1.5, "round_trips": 4},
        ]
    )
    monkeypatch.setattr(decode, "run_program", lambda *arguments: next(answers))
    settings = BenchSettings(output=tmp_path, decode={"texts": 2, "tokens": 3})
    bench, texts = Bench(settings, "model", tmp_path, tmp_path), list[list[int]]()
    first, second = (decode.measure(bench, {}, texts) for _ in range(2))
    assert first == {
        "tokens_per_second": 2.0,
        "tokens": 6,
        "tokens_per_round_trip": 1.0,
        "same_texts_share": 1.0,
    }
    assert second == {
        "tokens_per_second": 4.0,
        "tokens": 6,
        "tokens_per_round_trip": 1.5,
        "same_texts_share": 0.5,
    }
