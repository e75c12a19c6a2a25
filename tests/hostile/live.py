"""Live services of a run of honest clients, attacked while it waits and while it trains."""

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import httpx
import psutil

from lesft.spec import RunSpec
from tests.hostile.calls import AggregatorAttacks, Attack, Attacker, ServerAttacks
from tests.hostile.sockets import attack_grpc_port, attack_http_port
from tests.processes.harness import save_model_with_tokenizer
from tests.recovery.harness import CLIENTS, MODULES, Outcome, Run, Zygote, new_run
from tests.server.harness import raw_channel
from tests.tiny_models import HIDDEN_SIZE

CALLS_PER_CONNECTION = 150
"""Fewer than a service takes of one connection at once, lest they be refused for their rate."""

REQUESTS_PER_CONNECTION = 50
"""Connections of broken HTTP/2, and as many of bad HTTP, for each of these connections."""

ROUNDS = 40

_MIB = 1 << 20


@dataclass
class Figures:
    """What one service was sent and what became of it."""

    messages: int = 0
    calls: int = 0
    raw_connections: int = 0
    requests: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    """gRPC statuses by name, and HTTP's by number; "none" where a bad request got no answer."""
    seconds: float = 0.0
    resident_mib: list[float] = field(default_factory=list)
    """After the first tenth of the messages, and after each later part."""

    @property
    def server_errors(self) -> dict[str, int]:
        """Answers by which a service says that it has a bug."""
        return {
            status: count
            for status, count in self.statuses.items()
            if status in ("INTERNAL", "UNKNOWN") or (status.startswith("5") and status != "501")
        }


@dataclass
class Target:
    """One live service: its process, its ports and what calls attack it."""

    name: str
    pid: int
    grpc: str
    http: str
    method: str = ""
    attack: Attack | None = None
    figures: Figures = field(default_factory=Figures)

    def send(self, random: Random, messages: int) -> None:
        """So many messages, one connection after another."""
        figures, start = self.figures, time.monotonic()
        end = figures.messages + messages
        while figures.messages < end:
            if self.attack is not None:
                self._send_calls(random, self.attack, end)
                for _ in range(REQUESTS_PER_CONNECTION):
                    attack_grpc_port(random, self.grpc, self.method)
                    figures.raw_connections += 1
            for _ in range(REQUESTS_PER_CONNECTION):
                status = attack_http_port(random, self.http)
                figures.statuses[str(status or "none")] += 1
                figures.requests += 1
            figures.messages += REQUESTS_PER_CONNECTION * (1 if self.attack is None else 2)
        figures.seconds += time.monotonic() - start
        figures.resident_mib.append(psutil.Process(self.pid).memory_info().rss / _MIB)

    def _send_calls(self, random: Random, attack: Attack, end: int) -> None:
        with raw_channel(self.grpc) as channel:
            attacker = Attacker(channel)
            for _ in range(CALLS_PER_CONNECTION):
                if self.figures.messages >= end:
                    break
                self.figures.messages += attack(random, attacker)
                self.figures.calls += 1
            self.figures.statuses.update(attacker.statuses)


# ---------------------------------------------------------------------- the run


def server_target(run: Run) -> Target:
    """The server of a run under way."""
    spec = RunSpec.model_validate(run.ask("server", "/v1/run")["spec"])
    return Target(
        "server",
        run._pids["server"],
        run._addresses["server"],
        run._addresses["server control"],
        "/lesft.v1.TrainingService/Train",
        ServerAttacks(spec, CLIENTS, HIDDEN_SIZE),
    )


def aggregator_target(run: Run) -> Target:
    """The aggregator of a run under way."""
    return Target(
        "aggregator",
        run._pids["aggregator"],
        run._addresses["aggregator"],
        run._addresses["aggregator control"],
        "/lesft.v1.AggregationService/Submit",
        AggregatorAttacks(
            run.ask("aggregator", "/v1/run")["run_id"],
            CLIENTS,
            lambda: int(run.ask("aggregator", "/v1/run")["version"]),
        ),
    )


def client_target(run: Run) -> Target:
    """A training client, which listens for its owner alone."""
    endpoints = json.loads((run.folder / "a" / "endpoints.json").read_text())
    return Target("client", run._pids["a"], "", endpoints["control"])


@contextmanager
def endpoint_target(zygote: Zygote, run: Run, model: Path) -> Iterator[Target]:
    """`lesft-client serve` with the run's server."""
    arguments = [
        "serve",
        "--untuned",
        f"--server={run._addresses['server']}",
        f"--model={model}",
        f"--listen={(address := _free_address())}",
        f"--cache={run.folder / 'cache'}",
    ]
    pid = zygote.start(MODULES["client"], arguments, run.log("serve"))
    run._pids["serve"] = pid
    run.wait_for_log("serve", "ready: ")
    yield Target("endpoint", pid, "", address)
    assert _answers(f"http://{address}/v1/models")


def _free_address() -> str:
    from lesft_testbed.chaos_run import free_addresses

    return free_addresses(1)[0]


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def _order(run: Run, order: str) -> None:
    url = f"http://{run._addresses['server control']}/v1/{order}"
    httpx.post(url, trust_env=False).raise_for_status()


def _make_readable(folder: Path) -> None:
    """gRPC's own C code logs bytes of strangers as they are."""
    for path in folder.glob("*.log"):
        path.write_text(path.read_text(errors="backslashreplace"))


def _tracebacks(folder: Path) -> list[str]:
    """What follows "Traceback" in any log of a run."""
    logs = [path.read_text() for path in folder.glob("*.log")]
    return [part[:4000] for log in logs for part in log.split("Traceback (most")[1:]]


def undisturbed(zygote: Zygote, folder: Path, model: Path, rounds: int = ROUNDS) -> Outcome:
    """The run that nobody attacks."""
    with new_run(zygote, folder, model, rounds=rounds) as run:
        run.start_all()
        return run.finish()


def attacked(
    zygote: Zygote,
    folder: Path,
    model: Path,
    messages: int,
    seed: int,
    rounds: int = ROUNDS,
    with_endpoint: bool = True,
) -> tuple[Outcome, list[Figures]]:
    """The same run with so many messages at each service; what came of it, and the figures.

    They come while an operator has paused the run in the midst of it; to server and aggregator the
    last tenth comes in training.
    """
    random = Random(seed)
    with new_run(zygote, folder, model, rounds=rounds) as run:
        run.start_all()
        run.wait_until("server", lambda body: body["rounds_done"] >= 2)
        run.wait_until("aggregator", lambda body: body["version"] >= 1)
        _order(run, "pause")
        targets = [server_target(run), aggregator_target(run), client_target(run)]
        pids = dict(run._pids)
        for target in targets:
            for part in (1, 4, 4 if target.attack else 5):
                target.send(random, part * messages // 10)
        if with_endpoint:
            with endpoint_target(zygote, run, model) as target:
                for part in (1, 4, 5):
                    target.send(random, part * messages // 10)
                targets.append(target)
        _order(run, "resume")
        for target in targets[:2]:
            target.send(random, messages // 10)
        for name in ("server", "aggregator"):
            assert run.status(name) is None, f"{name} died:\n{run.logs()}"
        assert all(run._pids[name] == pid for name, pid in pids.items())
        for name in CLIENTS:
            run.wait(name)
        _make_readable(folder)
        tracebacks = _tracebacks(folder)
        assert not tracebacks, tracebacks[0]
        outcome = run.finish()
    return outcome, [target.figures for target in targets]


# ---------------------------------------------------------------------- the report


def report_sockets(messages: int, seed: int) -> bool:
    """The full figures on standard output; whether all was withstood."""
    say = sys.stdout.write
    zygote = Zygote()
    try:
        with tempfile.TemporaryDirectory() as folder:
            model = save_model_with_tokenizer(Path(folder) / "model")
            expected = undisturbed(zygote, Path(folder) / "undisturbed", model)
            outcome, figures = attacked(zygote, Path(folder) / "attacked", model, messages, seed)
    finally:
        zygote.close()
    say(f"{'service':12}{'messages':>9}{'calls':>8}{'raw':>7}{'http':>7}{'seconds':>9}  MiB\n")
    for name, each in zip(("server", "aggregator", "client", "endpoint"), figures, strict=True):
        memory = " ".join(f"{mib:.0f}" for mib in each.resident_mib)
        say(
            f"{name:12}{each.messages:9}{each.calls:8}{each.raw_connections:7}{each.requests:7}"
            f"{each.seconds:9.0f}  {memory}\n"
        )
        say(f"{'':12}{dict(each.statuses.most_common())}\n")
    same = outcome == expected
    errors = [each.server_errors for each in figures]
    say(f"outcome of the honest run as undisturbed, bit for bit: {same}\n")
    say(f"server errors: {errors}\n")
    return same and not any(errors)
