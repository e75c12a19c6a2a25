"""Services as processes: started, watched, blamed for the right thing, always ended."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lesft.errors import RunStopped
from lesft_testbed.processes import Process, Processes

SLEEP = "import time; time.sleep(60)"


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(process: Process) -> Callable[[], bool]:
    return lambda: process.exit_status is not None


def test_all_processes_are_ended_also_when_the_block_fails(tmp_path: Path) -> None:
    processes = Processes(tmp_path)

    def fail_in_the_block() -> None:
        with processes:
            for name in ("server", "client-0"):
                processes.start(name, python(SLEEP))
            raise KeyError

    with pytest.raises(KeyError):
        fail_in_the_block()
    pids = [process.pid for process in processes.all.values()]
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_process_that_ignores_the_request_to_stop_is_killed(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    process = Process("deaf", python(f"{deaf}print('up', flush=True)\n{SLEEP}"), *paths(tmp_path))
    wait_until(lambda: process.log_tail(1) == "up")
    process.ask_to_stop()
    process.wait(0.2)
    assert process.end() == "was ended by signal SIGKILL"


def paths(folder: Path) -> tuple[Path, Path]:
    return folder / "service.log", folder / "state"


def test_a_log_begins_with_the_command_line_and_holds_both_outputs(tmp_path: Path) -> None:
    script = "import sys; print('one', flush=True); print('two', file=sys.stderr)"
    process = Process("talker", python(script), *paths(tmp_path))
    process.wait(20)
    assert process.exit_status == 0
    assert process.log.read_text().splitlines() == [f"$ {sys.executable} -c {script}", "one", "two"]
    assert process.log_tail(1) == "two"


def test_addresses_are_known_once_the_service_has_left_them(tmp_path: Path) -> None:
    process = Process("sleeper", python(SLEEP), *paths(tmp_path))
    try:
        assert process.address("grpc") is None
        (process.state / "endpoints.json").write_text('{"grpc": "127.0.0.1:4"}')
        assert process.address("grpc") == "127.0.0.1:4"
        assert process.address("control") is None
    finally:
        process.ask_to_stop()
        process.wait(20)


def test_the_peak_of_memory_outlives_what_was_freed(tmp_path: Path) -> None:
    script = "x = bytearray(200 << 20); del x; print('freed', flush=True)\n" + SLEEP
    process = Process("eater", python(script), *paths(tmp_path))
    try:
        wait_until(lambda: process.log_tail(1) == "freed")
        now = process.measure_memory()
        assert 0 < now < 200 << 20
        assert 200 << 20 < process.peak_rss_bytes < 300 << 20
    finally:
        process.ask_to_stop()
        process.wait(20)
    assert process.measure_memory() == 0
    assert process.peak_rss_bytes > 200 << 20


STUBBORN = "import signal; signal.signal(signal.SIGTERM, lambda *_: print('no', flush=True))"
IMPATIENT = f"""
import os, signal, sys, time
from pathlib import Path
from lesft_testbed.processes import Processes
stubborn = {STUBBORN!r} + "; print('up', flush=True); " + {SLEEP!r}
with Processes(Path(sys.argv[1])) as processes:
    process = processes.start("server", [sys.executable, "-c", stubborn])
    while process.log_tail(1) != "up":
        time.sleep(0.01)
    print(process.pid, flush=True)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    raise KeyboardInterrupt
"""


def test_a_second_ctrl_c_leaves_no_service_behind(tmp_path: Path) -> None:
    command = [*python(IMPATIENT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.stderr.strip().endswith(b"KeyboardInterrupt")
    assert not psutil.pid_exists(int(done.stdout))
    assert (tmp_path / "server.log").read_text().endswith("no\n")


def test_a_failure_names_the_service_how_it_ended_and_the_end_of_its_log(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        processes.start("server", python(SLEEP))
        processes.check()
        failing = processes.start("client-0", python("print('no disk'); raise SystemExit(7)"))
        wait_until(ended(failing))
        with pytest.raises(RunStopped) as caught:
            processes.check(may_end=["client-0"])
    log = tmp_path / "client-0.log"
    assert str(caught.value).startswith(f"client-0 ended with status 7; the end of {log}:\n$ ")
    assert str(caught.value).endswith("\nno disk")


def test_a_client_that_others_stopped_is_not_blamed_when_the_cause_ends_later(
    tmp_path: Path,
) -> None:
    with Processes(tmp_path) as processes:
        cause = python("import time; time.sleep(0.5); print('out of memory'); raise SystemExit(1)")
        processes.start("client-1", cause)
        told = processes.start("client-0", python("raise SystemExit(3)"))
        wait_until(ended(told))
        with pytest.raises(
            RunStopped, match=r"^client-1 ended with status 1; (?s:.)*out of memory$"
        ):
            processes.check(may_end=["client-0", "client-1"])


def test_a_service_that_is_killed_is_named_with_its_signal(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        server = processes.start("server", python(SLEEP))
        psutil.Process(server.pid).kill()
        wait_until(ended(server))
        with pytest.raises(RunStopped, match=r"^server was ended by signal SIGKILL; the end of "):
            processes.check()


def test_only_those_that_may_end_may_end_well(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        done = processes.start("client-0", python("pass"))
        wait_until(ended(done))
        processes.check(may_end=["client-0"])
        with pytest.raises(RunStopped, match=r"^client-0 ended with status 0; "):
            processes.check()
