"""The real `lesft-aggregator` process over real sockets."""

import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.numpy import load

from lesft.bundle import bundle_chunks, bundle_info
from lesft.channel import open_channel
from lesft.errors import Unreachable
from lesft.interceptors import remote_errors
from lesft.v1 import aggregation_pb2 as pb
from lesft.v1.aggregation_pb2_grpc import AggregationServiceStub
from lesft_aggregator.main import main
from tests.aggregator.harness import NAME, make_adapter, make_tensors

COMMAND = [sys.executable, "-c", "from lesft_aggregator.main import main; main()"]
FREE_PORTS = ["--listen", "127.0.0.1:0", "--control", "127.0.0.1:0"]


def start(state: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """A running aggregator and the line that it says when it is ready."""
    command = [*COMMAND, *FREE_PORTS, "--clients", "1", "--state", str(state), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def submission(seed: int, base_version: int) -> Iterator[pb.SubmitRequest]:
    data = make_adapter(seed)
    yield pb.SubmitRequest(
        submission=pb.Submission(
            client_id="a",
            run_id="lesft",
            base_version=base_version,
            num_samples=1,
            bundle=bundle_info(data),
        )
    )
    for chunk in bundle_chunks(data):
        yield pb.SubmitRequest(chunk=chunk)


def fetch(stub: Any, version: int) -> dict[str, Any]:
    request = pb.FetchRequest(client_id="a", run_id="lesft", version=version)
    answers = stub.Fetch(request, timeout=20)
    return load(b"".join(answer.chunk.data for answer in answers))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_stop_and_goes_on_after_a_kill(
    number: signal.Signals, tmp_path: Path
) -> None:
    process, _ = start(tmp_path)
    addresses = json.loads((tmp_path / "endpoints.json").read_text())
    with open_channel(addresses["grpc"]) as channel:
        stub: Any = AggregationServiceStub(channel)
        assert stub.Submit(submission(1, base_version=0), timeout=20).version == 1
        assert np.array_equal(fetch(stub, 1)[NAME], make_tensors(1)[NAME])
    process.kill()
    process.communicate()

    process, ready = start(tmp_path)
    addresses = json.loads((tmp_path / "endpoints.json").read_text())
    assert ready == (
        f"lesft-aggregator ready: grpc {addresses['grpc']}, control http://{addresses['control']}"
    )
    with urllib.request.urlopen(f"http://{addresses['control']}/v1/run") as response:
        assert json.load(response)["version"] == 1
    with open_channel(addresses["grpc"]) as channel:
        check_health(channel)
        stub = AggregationServiceStub(channel)
        assert np.array_equal(fetch(stub, 1)[NAME], make_tensors(1)[NAME])
        waiter, ended = wait_in_thread(stub, version=2)
        process.send_signal(number)
        _, log = process.communicate(timeout=20)
        waiter.join(timeout=20)
    assert process.returncode == 0
    assert log.splitlines()[-1].endswith("INFO stopped")
    assert "Traceback" not in log
    assert ended == ["aggregator: the aggregator is stopping"]


def check_health(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for name in ("", "lesft.v1.AggregationService"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def wait_in_thread(stub: Any, version: int) -> tuple[threading.Thread, list[str]]:
    """Fetches a version that never comes; the list gets what Unreachable says."""
    ended: list[str] = []
    # The call is on its way when this returns: the server gets it before it gets the signal.
    answers = stub.Fetch(pb.FetchRequest(client_id="a", run_id="lesft", version=version))

    def wait() -> None:
        try:
            with remote_errors("aggregator"):
                next(answers)
        except Unreachable as error:
            ended.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    assert np.array_equal(fetch(stub, 1)[NAME], make_tensors(1)[NAME])
    return thread, ended


def test_it_says_in_one_line_why_it_cannot_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for options, message in [
            (["--control", address], f"cannot listen on {address}: Address already in use"),
            (["--listen", "192.0.2.1:0"], "cannot listen on 192.0.2.1:0: the port is taken"),
            (["--state", "/proc/none"], "[Errno 2] No such file or directory: '/proc/none'"),
        ]:
            with pytest.raises(SystemExit) as caught:
                main([*FREE_PORTS, "--clients", "1", "--state", str(tmp_path), *options])
            assert caught.value.code == 1
            assert capsys.readouterr().err.startswith(f"lesft-aggregator: {message}")
        process, ready = start(tmp_path, "--listen", address)
        _, log = process.communicate(timeout=20)
    assert (ready, process.returncode) == ("", 1)
    assert log.splitlines()[-1] == (
        f"lesft-aggregator: cannot listen on {address}: the port is taken or the host unknown"
    )


def test_it_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, lesft_aggregator.main, lesft_aggregator.server; "
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[]\n"
