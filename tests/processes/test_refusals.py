"""What the commands refuse, by which message and status; called in this process, on real sockets.

`test_run` has some of them as processes.
"""

import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lesft.errors import InvalidInput, RunStopped
from lesft_client.main import main as client_main
from lesft_server.main import main as server_main
from tests.client.harness import running_aggregator
from tests.harness import RunningServer, running_server, server_settings
from tests.processes.harness import (
    ANY_PORT,
    make_samples,
    save_model_with_tokenizer,
    write_samples,
)

GOOD = '{"prompt": "a", "target": "b", "reference": "c"}\n'

Refuse = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_with_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(server_settings(model, tmp_path_factory.mktemp("server"))) as running:
        yield running


@pytest.fixture(scope="module")
def aggregator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_aggregator(tmp_path_factory.mktemp("aggregator")) as address:
        yield address


@pytest.fixture
def taken() -> Iterator[str]:
    """An address that somebody listens on already."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Relative paths are short in messages; what main changes in the process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    signals = (signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in signals]
    yield
    for number, handler in zip(signals, handlers, strict=True):
        signal.signal(number, handler)


def refused(
    main: Callable[[list[str]], None], argv: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """The exit status and the last line that the user reads."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert isinstance(caught.value.code, int)
    return caught.value.code, capsys.readouterr().err.splitlines()[-1]


def options(values: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


# ---------------------------------------------------------------------- exit statuses


def let_train_be(monkeypatch: pytest.MonkeyPatch, run: Callable[[], None]) -> None:
    monkeypatch.setattr("lesft.commands.load_settings", lambda *_: None)
    monkeypatch.setattr("lesft_client.train.train", lambda _: run())


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InvalidInput("--data: no"), 1, "--data: no"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (RunStopped("the run has ended: client 'b' left"), 3, "the run has ended: client 'b' left"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_the_clients_status_tells_whose_fault_it_was(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
) -> None:
    def fail() -> None:
        raise error

    let_train_be(monkeypatch, fail)
    assert refused(client_main, ["train"], capsys) == (status, f"lesft-client: {message}")


def test_sigterm_is_the_same_as_ctrl_c_to_a_client(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop() -> None:
        signal.raise_signal(signal.SIGTERM)

    let_train_be(monkeypatch, stop)
    assert refused(client_main, ["train"], capsys) == (130, "lesft-client: stopped")


def test_a_hang_up_stops_a_client_but_not_under_nohup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    let_train_be(monkeypatch, lambda: signal.raise_signal(signal.SIGHUP))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may themselves run under nohup
    assert refused(client_main, ["train"], capsys) == (130, "lesft-client: stopped")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    client_main(["train"])


def test_a_server_may_be_interrupted_while_it_loads(
    monkeypatch: pytest.MonkeyPatch, refuse_server: Refuse
) -> None:
    def interrupt(settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lesft_server.server.run", interrupt)
    assert refuse_server() == (130, "lesft-server: stopped")


# ---------------------------------------------------------------------- the server


@pytest.fixture
def refuse_server(model: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    def refuse(**changes: Any) -> tuple[int, str]:
        values = {
            "model": model,
            "state": "state",
            "listen": ANY_PORT,
            "control": ANY_PORT,
            "rounds": 1,
            "threads": 1,
        }
        return refused(server_main, options({**values, **changes}), capsys)

    return refuse


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"listen": "localhost"},
            "an address must be HOST:PORT with a port up to 65535 and brackets around an IPv6 "
            "host, got 'localhost'",
        ),
        (
            {"lora.target_modules": "up_proj,foo"},
            "lora.target_modules: foo is no linear layer of this model; it has down_proj, "
            "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
        ({"device": "gpu"}, "--device must be auto or a torch device, got 'gpu'"),
        (
            {"state": "/proc/none"},
            "[Errno 2] No such file or directory: '/proc/none'",
        ),
    ],
)
def test_a_server_that_cannot_start_says_why(
    refuse_server: Refuse, changes: dict[str, Any], message: str
) -> None:
    assert refuse_server(**changes) == (1, f"lesft-server: {message}")


def test_a_server_refuses_a_folder_that_is_no_model(refuse_server: Refuse, tmp_path: Path) -> None:
    status, message = refuse_server(model="none")
    assert status == 1
    assert message.startswith(
        "lesft-server: --model none is neither a folder nor a model that the hub gives ("
    )
    (tmp_path / "empty").mkdir()
    assert refuse_server(model="empty") == (
        1,
        "lesft-server: empty has no config.json: give a folder in Hugging Face layout or a hub id",
    )


def test_a_server_refuses_a_family_that_is_not_supported(
    refuse_server: Refuse, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "gpt2"}')
    status, message = refuse_server(model="other")
    assert status == 1
    assert message.startswith(
        "lesft-server: model family 'gpt2' is not supported; supported are apertus, arcee, "
    )
    assert message.endswith(", starcoder2")


def test_a_server_names_the_control_address_that_is_taken(
    refuse_server: Refuse, taken: str
) -> None:
    assert refuse_server(control=taken) == (
        1,
        f"lesft-server: cannot listen on {taken}: Address already in use; choose another address, "
        "or port 0 for any free one",
    )


# ---------------------------------------------------------------------- the client


@pytest.fixture
def refuse_client(
    server: RunningServer,
    aggregator: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Refuse:
    write_samples(tmp_path / "data.jsonl", make_samples(20))

    def refuse(**changes: Any) -> tuple[int, str]:
        values = {
            "server": server.grpc,
            "aggregator": aggregator,
            "control": ANY_PORT,
            "client_id": "a",
            "model": model,
            "state": "state",
            "data": "data.jsonl",
            "threads": 1,
            "patience_seconds": 0.1,
            "identity": tmp_path / "identity",
        }
        result = refused(client_main, ["train", *options({**values, **changes})], capsys)
        assert server.engine.run.members == {}
        return result

    return refuse


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + '{"prompt": \n', "bad.jsonl:2: is not JSON: Expecting value (column "),
        (GOOD + "[1]\n", "bad.jsonl:2: must be a JSON object, got list"),
        (
            GOOD + '{"prompt": "a", "target": " "}\n',
            'bad.jsonl:2: "target" must not be empty; fill it or drop the row',
        ),
        (
            GOOD + '{"prompt": "a", "completion": "b"}\n',
            'bad.jsonl:2: unknown field "completion"; a line may have prompt, target, reference, '
            "answer",
        ),
        (
            GOOD + '{"prompt": "a", "reference": "b"}\n',
            'bad.jsonl:2: needs the field "target"; its fields are: prompt, reference',
        ),
        ("", "bad.jsonl (train) has no samples: the file is empty"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_line(
    refuse_client: Refuse, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    status, line = refuse_client(data="bad.jsonl")
    assert status == 1
    assert line.startswith(f"lesft-client: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": "none.jsonl"},
            "'none.jsonl' is neither a data set (gsm8k, commonsense_qa, aqua_rat, wordproblems) "
            "nor a JSONL file or folder that exists; check the spelling or the path",
        ),
        (
            {"max_length": 5},
            "none of the 18 samples fits into --max-length 5 tokens: the shortest has 20, the "
            "longest 24; set --max-length 24 to use them all",
        ),
        (
            {"server": "192.0.2.1:5"},
            "this device has not enrolled with 192.0.2.1:5 (but with: none): ask its operator "
            "for an enrolment token and run lesft-client enroll TOKEN, or accept that anyone on "
            "the way can read and change everything with --insecure",
        ),
        (
            {"control": "0.0.0.0:0"},
            "--control 0.0.0.0:0 can be reached from elsewhere: give --control-token with a file "
            "whose token its users must bring, or let anybody look with --listener-insecure",
        ),
        (
            {"aggregator": "localhost"},
            "an address must be HOST:PORT with a port up to 65535 and brackets around an IPv6 "
            "host, got 'localhost'",
        ),
        ({"device": "gpu"}, "--device must be auto or a torch device, got 'gpu'"),
        ({"state": "/proc/none"}, "[Errno 2] No such file or directory: '/proc/none'"),
    ],
)
def test_a_client_that_cannot_begin_says_why(
    refuse_client: Refuse, changes: dict[str, Any], message: str
) -> None:
    assert refuse_client(**changes) == (1, f"lesft-client: {message}")


def test_the_runs_own_limit_is_the_servers_to_raise(refuse_client: Refuse, tmp_path: Path) -> None:
    long = {"prompt": "Add 1 and 2. " * 20, "reference": "3", "target": "3"}
    write_samples(tmp_path / "long.jsonl", [long, {**long, "target": "4"}])
    status, line = refuse_client(data="long.jsonl", max_length=1000)
    assert status == 1
    assert line.startswith("lesft-client: none of the 2 samples fits into --max-length 64 tokens: ")
    assert line.endswith("; 64 is the run's limit, which its server sets by --max-length")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cut_layer": 2}, "cut_layer: server 1, client 2; leave the client's --cut-layer out"),
        ({"lora.rank": 4}, "lora.rank: server 8, client 4; leave the client's LoRA options out"),
        (
            {"lora.target_modules": "up_proj"},
            "lora.target_modules: server gate_proj,up_proj,down_proj, client up_proj; leave the "
            "client's LoRA options out",
        ),
        (
            {"activation_encoding": "bf16"},
            "activation_encoding: server raw, client bf16; leave the client's activation_encoding "
            "out",
        ),
    ],
)
def test_a_client_that_insists_on_another_run_is_refused_by_name(
    refuse_client: Refuse, server: RunningServer, changes: dict[str, Any], message: str
) -> None:
    assert refuse_client(**changes) == (1, f"lesft-client: server {server.grpc}: {message}")


def test_a_client_names_the_control_address_that_is_taken(
    refuse_client: Refuse, taken: str
) -> None:
    assert refuse_client(control=taken) == (
        1,
        f"lesft-client: cannot listen on {taken}: Address already in use; choose another address, "
        "or port 0 for any free one",
    )


def test_a_client_names_the_service_that_does_not_answer(refuse_client: Refuse) -> None:
    for party in ("server", "aggregator"):
        status, line = refuse_client(**{party: "127.0.0.1:1"})
        assert status == 1
        assert line.startswith(f"lesft-client: {party} 127.0.0.1:1: ")
        assert line.endswith(
            "(tried for 0 s; is it running and is the address right? --patience-seconds waits "
            "longer)"
        )


def test_a_client_refuses_a_folder_without_a_tokenizer_or_without_weights(
    refuse_client: Refuse, model: Path, tmp_path: Path
) -> None:
    status, line = refuse_client(model="none")
    assert status == 1
    assert line.startswith("lesft-client: --model none: no tokenizer can be loaded from there (")
    assert line.endswith("); give a folder with tokenizer.json, or a hub id")
    (tmp_path / "tokenizer").mkdir()
    for file in model.glob("tokenizer*"):
        (tmp_path / "tokenizer" / file.name).write_bytes(file.read_bytes())
    assert refuse_client(model="tokenizer", weights="local") == (
        1,
        "lesft-client: --weights local needs safetensors files in the folder --model tokenizer; "
        "leave it out to fetch the front from the server",
    )


def test_a_tokenizer_that_is_not_the_models_is_refused(
    refuse_client: Refuse, server: RunningServer, model: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([*(f"unused {n}" for n in range(100)), "It is"])
    unknown = tokenizer.convert_tokens_to_ids("It is")
    assert unknown > 300
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert refuse_client(model="tokenizer", cache=tmp_path / "cache") == (
        1,
        f"lesft-client: --model tokenizer: its tokenizer gives token {unknown}, but the run's "
        f"model knows 300 tokens only: use the tokenizer of {server.spec.model_name}",
    )


def test_the_data_command_says_why_it_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_samples(tmp_path / "data.jsonl", make_samples(4))
    argv = ["data", "--data=data.jsonl", "--output=none/samples.jsonl"]
    assert refused(client_main, argv, capsys) == (
        1,
        "lesft-client: [Errno 2] No such file or directory: 'none/samples.jsonl'",
    )
