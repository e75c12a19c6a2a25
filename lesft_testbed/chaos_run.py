"""One run of all services through fault-injecting proxies, from the start to what came of it."""

import json
import random
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from lesft.errors import RunStopped, Unreachable
from lesft.spec import LoraSpec, OptimizerSpec
from lesft_testbed.chaos_plan import AGGREGATOR, SERVER, Fault, link_name
from lesft_testbed.chaos_result import InjectedFault, Outcome
from lesft_testbed.commands import aggregator_command, client_command, client_name, server_command
from lesft_testbed.processes import Processes
from lesft_testbed.proxy import FaultProxy
from lesft_testbed.settings import ChaosSettings, RunSettings
from lesft_testbed.tiny_model import MAX_LENGTH
from lesft_testbed.watch import Watcher

_SAMPLES, _HELD_OUT = 6, 2
_POLL_SECONDS = 0.05
_LATENCY_SECONDS = 0.02
"""Of every link, always: rounds shall last long enough to be hit in their midst."""

_STALLED_SECONDS = 300
"""Longer than every patience of the services themselves."""

_ANSWER_SECONDS = 60

PORTS = range(20_000, 32_000)
"""Below those that systems give to outgoing connections: one of those could take a dead service's
port before the service is back."""

_HEARTBEATS = {"heartbeat_seconds": 0.3}
_SERVER_OPTIONS = {**_HEARTBEATS, "stall_seconds": 3}
_CLIENT_OPTIONS = {"stall_seconds": 3, "reconnect_seconds": 120, "patience_seconds": 60}


@dataclass(frozen=True)
class Progress:
    """How far the server has come, in rounds and in steps of the whole cohort.

    Both go back when the server goes back to its checkpoint.
    """

    rounds: int = 0
    steps: int = 0


@dataclass
class _Awaited:
    """A fault whose recovery has not come yet."""

    fault: InjectedFault
    injected_at: float
    goal_steps: int


class ChaosRun:
    """One run. Without a plan nothing is disturbed."""

    def __init__(
        self,
        settings: ChaosSettings,
        folder: Path,
        model: Path,
        data: Path,
        say: Callable[[str], None],
        plan: Sequence[Fault] = (),
        typical_round_seconds: float = 0.0,
    ) -> None:
        """Logs and state folders go to `folder`; `plan` is in order."""
        self._settings = settings
        self._folder = folder
        self._model, self._data = model, data
        self._say = say
        self._round_seconds = typical_round_seconds
        self._plan = deque(plan)
        self._reached_at: list[float] = []
        self._restarts: dict[str, float] = {}
        self._commands: dict[str, list[str]] = {}
        self._proxies: dict[str, FaultProxy] = {}
        self._clients = [client_name(index) for index in range(settings.clients)]
        self._progress = Progress()
        self._awaited: list[_Awaited] = []
        self._injected: list[InjectedFault] = []

    def run(self) -> Outcome:
        """Train to the end while the plan's faults come, and gather what came of it.

        Raises RunStopped, naming the service and the end of its log, when one fails, and when
        nothing goes on any more.
        """
        folder = self._folder
        folder.mkdir(parents=True)
        with ExitStack() as stack:
            self._prepare(stack)
            self._processes = stack.enter_context(Processes(folder))
            self._watcher = Watcher(self._processes)
            stack.callback(self._watcher.close)
            self._start_time = time.monotonic()
            for name, command in self._commands.items():
                self._processes.start(name, command)
            self._train()
            seconds = time.monotonic() - self._start_time
            return self._outcome(seconds)

    # ------------------------------------------------------------------ starting

    def _prepare(self, stack: ExitStack) -> None:
        """The command lines, and a proxy for each link."""
        run = _run_settings(self._settings, self._data, self._folder)
        model, state = str(self._model), Processes(self._folder).state_of
        server, server_control, aggregator, aggregator_control = free_addresses(4)
        self._commands[SERVER] = server_command(
            run,
            model,
            state(SERVER),
            {"listen": server, "control": server_control, **_SERVER_OPTIONS},
        )
        self._commands[AGGREGATOR] = aggregator_command(
            run,
            state(AGGREGATOR),
            {"listen": aggregator, "control": aggregator_control, **_HEARTBEATS},
        )
        for index, client in enumerate(self._clients):
            for service, address in ((SERVER, server), (AGGREGATOR, aggregator)):
                proxy = FaultProxy(address, _LATENCY_SECONDS)
                self._proxies[link_name(client, service)] = proxy
                stack.callback(proxy.close)
            self._commands[client] = client_command(
                run,
                model,
                state(client),
                index,
                self._proxies[link_name(client, SERVER)].address,
                self._proxies[link_name(client, AGGREGATOR)].address,
                _CLIENT_OPTIONS,
            )

    # ------------------------------------------------------------------ training

    def _train(self) -> None:
        last_event, last_state = time.monotonic(), None
        while self._restarts or not all(map(self._has_finished, self._clients)):
            self._start_again()
            self._processes.check(may_end=self._clients)
            self._read_progress()
            self._inject_what_is_due()
            self._note_recoveries()
            state = (self._progress, len(self._injected), len(self._restarts))
            now = time.monotonic()
            if state != last_state:
                last_event, last_state = now, state
            elif now - last_event > _STALLED_SECONDS:
                raise RunStopped(
                    f"training has not gone on for {_STALLED_SECONDS} s after "
                    f"{self._progress.rounds} rounds; the services' logs are in {self._folder}"
                )
            time.sleep(_POLL_SECONDS)
        self._progress = Progress(self._settings.rounds, self._num_steps)
        self._note_recoveries()

    @property
    def _num_steps(self) -> int:
        return self._settings.rounds * self._settings.accumulation

    def _has_finished(self, client: str) -> bool:
        process = self._processes.all.get(client)
        return process is not None and process.exit_status == 0

    def _read_progress(self) -> None:
        """As the server says; as it said last where it does not answer."""
        server = self._processes.all.get(SERVER)
        run = self._watcher.get(server, "/v1/run") if server is not None else None
        if run is None:
            return
        self._progress = Progress(run["rounds_done"], run["steps_applied"])
        while len(self._reached_at) <= self._progress.rounds:
            self._reached_at.append(time.monotonic())

    # ------------------------------------------------------------------ faults

    def _inject_what_is_due(self) -> None:
        while self._plan and self._plan[0].at_round < len(self._reached_at):
            fault = self._plan[0]
            due = self._reached_at[fault.at_round] + fault.into_round * self._round_seconds
            is_kill = fault.kind == "kill"
            victim_is_down = is_kill and fault.target not in self._processes.all
            if time.monotonic() < due or victim_is_down:
                return
            if is_kill and self._has_finished(fault.target):
                return  # too late; the outcome counts what is left of the plan
            self._inject(self._plan.popleft())

    def _inject(self, fault: Fault) -> None:
        self._read_progress()
        rounds, now = self._progress.rounds, time.monotonic()
        if fault.kind == "kill":
            self._processes.kill(fault.target)
            self._restarts[fault.target] = now + fault.seconds
        elif fault.kind == "cut":
            self._proxies[fault.target].cut(fault.seconds)
        elif fault.kind == "delay":
            self._proxies[fault.target].delay(fault.held_seconds, fault.seconds)
        else:
            self._proxies[fault.target].half_open(
                fault.seconds, fault.direction, fault.new_connections
            )
        injected = InjectedFault(fault, rounds, now - self._start_time)
        self._injected.append(injected)
        if self._awaited:
            for each in (injected, *(awaited.fault for awaited in self._awaited)):
                each.alone = False
        goal = goal_steps(fault, rounds, self._settings)
        self._awaited.append(_Awaited(injected, now, goal))

    def _start_again(self) -> None:
        for name, due in list(self._restarts.items()):
            if time.monotonic() >= due:
                del self._restarts[name]
                self._processes.start(name, self._commands[name], append=True)

    def _note_recoveries(self) -> None:
        for awaited in list(self._awaited):
            if self._progress.steps >= awaited.goal_steps:
                self._awaited.remove(awaited)
                injected = awaited.fault
                injected.recovery_seconds = time.monotonic() - awaited.injected_at
                self._say(
                    f"round {injected.at_round}: {injected.fault.describe()}; "
                    f"training went on after {injected.recovery_seconds:.1f} s"
                )

    # ------------------------------------------------------------------ what came of it

    def _outcome(self, seconds: float) -> Outcome:
        server_run = self._ask(SERVER, "/v1/run")
        newest = self._ask(AGGREGATOR, "/v1/run")["version"]
        folders = {name: self._processes.state_of(name) for name in (SERVER, *self._clients)}
        return Outcome(
            adapters={
                name: _digest(state / "adapter.safetensors") for name, state in folders.items()
            },
            versions=[
                self._ask(AGGREGATOR, f"/v1/adapters/{version}")["sha256"]
                for version in range(1, newest + 1)
            ],
            losses={name: _losses(folders[name]) for name in self._clients},
            round_seconds=[record["seconds"] for record in self._ask(SERVER, "/v1/rounds")],
            steps_applied=server_run["steps_applied"],
            lineage=server_run["lineage"],
            seconds=seconds,
            faults=self._injected,
            faults_left=len(self._plan),
        )

    def _ask(self, name: str, path: str) -> Any:
        """An answer of a service that may have been started again only now."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        while time.monotonic() < deadline:
            self._processes.check(may_end=self._clients)
            answer = self._watcher.get(self._processes.all[name], path)
            if answer is not None:
                return answer
            time.sleep(_POLL_SECONDS)
        raise Unreachable(
            f"{name} has not answered GET {path} for {_ANSWER_SECONDS} s after the run; its log is "
            f"in {self._folder}"
        )


def goal_steps(fault: Fault, rounds_done: int, settings: ChaosSettings) -> int:
    """Steps that are recorded only once the run has got over a fault.

    They include the first one after the round that was under way, whose parts may all have been
    sent before; where the fault concerns the aggregator, the first one after the next aggregation
    that begins.
    """
    past = rounds_done + 1
    if fault.concerns_aggregator:
        interval = settings.aggregation_interval
        past = max(past, (rounds_done // interval + 1) * interval)
    return min(past * settings.accumulation + 1, settings.rounds * settings.accumulation)


def free_addresses(count: int, ports: Sequence[int] = PORTS) -> list[str]:
    """Addresses of this machine that nobody listens on, at some of these ports."""
    with ExitStack() as held:
        addresses: list[str] = []
        for port in random.sample(ports, len(ports)):
            if len(addresses) == count:
                break
            candidate = held.enter_context(socket.socket())
            with suppress(OSError):
                candidate.bind(("127.0.0.1", port))
                addresses.append(f"127.0.0.1:{port}")
    return addresses


def samples_in_all(settings: ChaosSettings) -> int:
    """Enough for all clients' shares, of which a file gives a part to the held-out ones."""
    return 10 * settings.clients * (_SAMPLES + _HELD_OUT)


def _run_settings(settings: ChaosSettings, data: Path, folder: Path) -> RunSettings:
    """The run's options; unvalidated, so that no environment variable has a say."""
    same = (
        *("clients", "rounds", "accumulation", "aggregation_interval", "seed"),
        *("activation_encoding", "gradient_encoding", "adapter_encoding", "loss"),
    )
    return RunSettings.model_construct(
        **{name: getattr(settings, name) for name in same},
        run_id="chaos",
        max_length=MAX_LENGTH,
        lora=LoraSpec(dropout=0.2),  # what is computed again must draw the same again
        optimizer=OptimizerSpec(learning_rate=5e-3),
        data=str(data),
        samples=_SAMPLES,
        held_out=_HELD_OUT,
        cut_layer=1,
        device="cpu",
        cache=folder / "cache",
        server_threads=1,
        client_threads=1,
    )


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def _losses(state: Path) -> list[float]:
    losses: list[float] = json.loads((state / "result.json").read_text())["loss_by_round"]
    return losses
