"""The testbed's command lines say what its settings say, as the services themselves read them."""

from pathlib import Path

import pytest

from lesft.settings import load_settings
from lesft.spec import LoraSpec, LossSpec, OptimizerSpec, RunOptions
from lesft_aggregator.settings import AggregatorSettings
from lesft_client.settings import EvaluateSettings
from lesft_client.train_settings import TrainSettings
from lesft_server.settings import ServerSettings
from lesft_testbed.commands import (
    aggregator_command,
    client_command,
    evaluate_command,
    server_command,
)
from lesft_testbed.settings import RunSettings

SETTINGS = RunSettings(
    run_id="trial",
    clients=3,
    rounds=7,
    accumulation=2,
    batch_size=3,
    aggregation_interval=5,
    train_front=False,
    aggregate=False,
    personal_layers=(),
    max_length=99,
    mode="deadline",
    quorum=1,
    deadline_seconds=7.5,
    seed=11,
    activation_encoding="bf16",
    gradient_encoding="bf16",
    adapter_encoding="int4",
    inference_encoding="bf16",
    lora=LoraSpec(rank=4, alpha=12.5, dropout=0.1, target_modules=("q_proj", "v_proj")),
    loss=LossSpec(
        token_weights="uniform",
        uniform_weight=0.5,
        salient_threshold=0.9,
        gamma_salient=4,
        gamma_sub_salient=0.2,
        gamma_irrelevant=0.7,
        clustering="contiguous",
        cluster_similarity=-0.5,
        base_nll_weight=0.25,
        reference_nll_weight=1e-7,
    ),
    optimizer=OptimizerSpec(
        learning_rate=2e-4,
        schedule="cosine",
        warmup_rounds=2,
        weight_decay=0.01,
        max_grad_norm=0.5,
    ),
    data="gsm8k",
    samples=10,
    held_out=2,
    cut_layer=2,
    weights="local",
    device="cpu",
    precision="bf16",
    server_threads=2,
    client_threads=3,
    cache=Path("cache"),
)


def test_the_server_is_told_every_option_of_the_run() -> None:
    _, *argv = server_command(SETTINGS, "model", Path("state"))
    server = load_settings(ServerSettings, "lesft-server", argv)
    names = set(RunOptions.model_fields)
    assert server.model_dump(include=names) == SETTINGS.model_dump(include=names)
    defaults = RunSettings().model_dump(include=names)
    unchanged = [name for name in names if SETTINGS.model_dump()[name] == defaults[name]]
    assert unchanged == ["personal_layers"]  # which would contradict the others
    assert (server.model, server.state, server.cut_layer) == ("model", Path("state"), 2)
    assert (server.device, server.precision, server.threads) == ("cpu", "bf16", 2)
    assert (server.listen, server.control) == ("127.0.0.1:0", "127.0.0.1:0")


def test_layers_that_stay_personal_are_told_as_a_list() -> None:
    _, *argv = server_command(RunSettings(personal_layers=(0, 2)), "model", Path("state"))
    server = load_settings(ServerSettings, "lesft-server", argv)
    assert (server.personal_layers, server.train_front, server.aggregate) == ((0, 2), True, True)


def test_the_aggregator_is_told_the_run_its_number_of_clients_and_its_deadline() -> None:
    _, *argv = aggregator_command(SETTINGS, Path("state"))
    aggregator = load_settings(AggregatorSettings, "lesft-aggregator", argv)
    assert (aggregator.run_id, aggregator.clients) == ("trial", 3)
    assert (aggregator.quorum, aggregator.deadline_seconds) == (1, 7.5)
    assert (aggregator.listen, aggregator.control) == ("127.0.0.1:0", "127.0.0.1:0")


def test_each_client_is_told_its_own_share_of_the_same_data() -> None:
    commands = [
        client_command(SETTINGS, "model", Path(f"state-{i}"), i, "127.0.0.1:1", "127.0.0.1:2")
        for i in range(3)
    ]
    clients = [
        load_settings(TrainSettings, "lesft-client train", command[2:]) for command in commands
    ]
    assert [command[1] for command in commands] == ["train"] * 3
    assert [client.share for client in clients] == ["1/3", "2/3", "3/3"]
    assert [client.client_id for client in clients] == ["client-0", "client-1", "client-2"]
    assert [client.state for client in clients] == [Path(f"state-{i}") for i in range(3)]
    first = clients[0]
    assert (first.data, first.data_seed, first.samples, first.held_out) == ("gsm8k", 11, 10, 2)
    assert (first.server, first.aggregator) == ("127.0.0.1:1", "127.0.0.1:2")
    assert (first.weights, first.cache) == ("local", Path("cache"))
    assert (first.device, first.precision, first.threads) == ("cpu", "bf16", 3)
    assert (first.local, first.run, first.skew) == (False, None, "none")


def test_a_client_without_a_server_is_told_the_whole_run() -> None:
    settings = RunSettings(
        method="fedavg",
        clients=3,
        rounds=0,
        samples=8,
        epochs=2,
        personal_layers=(1,),
        skew="size",
        skew_alpha=0.25,
        lora=LoraSpec(target_modules=("q_proj", "v_proj")),
    )
    _, *argv = client_command(settings, "model", Path("state"), 1, "", "127.0.0.1:2")
    client = load_settings(TrainSettings, "lesft-client train", argv[1:])
    assert (client.local, client.server, client.aggregator) == (True, "", "127.0.0.1:2")
    assert (client.share, client.skew, client.skew_alpha) == ("2/3", "size", 0.25)
    assert client.run is not None
    names = set(RunOptions.model_fields) - {"rounds"}
    assert client.run.model_dump(include=names) == settings.model_dump(include=names)
    assert client.run.rounds == 4


def test_one_node_with_all_data_is_told_so() -> None:
    settings = RunSettings(method="centralized", server_threads=2, client_threads=1).as_trained()
    _, *argv = client_command(settings, "model", Path("state"), 0, "", "")
    client = load_settings(TrainSettings, "lesft-client train", argv[1:])
    assert (client.share, client.samples, client.held_out) == ("1/1", 48, 16)
    assert (client.aggregator, client.threads) == ("", 2)
    assert client.run is not None
    assert (client.run.clients, client.run.batch_size, client.run.rounds) == (1, 4, 9)
    assert client.run.aggregate is False


def test_an_evaluation_is_told_which_adapter_which_questions_and_what_to_measure() -> None:
    settings = SETTINGS.model_copy(
        update={"questions": 40, "measure": "both", "max_tokens": 77, "data": "aqua_rat"}
    )

    def evaluation(adapter: Path | None, share: tuple[int, int]) -> EvaluateSettings:
        command = evaluate_command(settings, "model", Path("out"), adapter, share)
        assert command[1] == "evaluate"
        return load_settings(EvaluateSettings, "lesft-client evaluate", command[2:])

    tuned = evaluation(Path("adapter"), (2, 3))
    assert (tuned.local, tuned.untuned, tuned.adapter) == (True, False, Path("adapter"))
    assert (tuned.model, tuned.benchmark, tuned.data_seed) == ("model", "aqua_rat", 11)
    assert (tuned.questions, tuned.share, tuned.measure) == (40, "2/3", "both")
    assert (tuned.max_tokens, tuned.batch, tuned.output) == (77, 32, Path("out"))
    assert (tuned.device, tuned.precision, tuned.threads) == ("cpu", "bf16", 2)
    untuned = evaluation(None, (1, 1))
    assert (untuned.untuned, untuned.adapter, untuned.share) == (True, None, "1/1")


@pytest.mark.parametrize(
    ("samples", "epochs", "rounds", "expected"), [(12, 3, 0, 9), (10, 3, 0, 7), (12, 3, 5, 5)]
)
def test_epochs_make_as_many_rounds_as_they_fill(
    samples: int, epochs: int, rounds: int, expected: int
) -> None:
    assert RunSettings(samples=samples, epochs=epochs, rounds=rounds).num_rounds == expected


def test_too_few_samples_for_one_round_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"samples x epochs must be at least accumulation x batch_size \(4\) for one round, "
        r"got 3 x 1",
    ):
        RunSettings(samples=3, epochs=1)
