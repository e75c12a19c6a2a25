"""The server's Prometheus metrics; docs/monitoring.md has them in a table."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lesft.loss import TokenClass
from lesft.refused_calls import RefusedCalls, RefusedRequests, limit_hits
from lesft_server.generation import Generation
from lesft_server.model_service import ModelService
from lesft_server.run import Run, RunState
from lesft_server.session import Engine


class Metrics:
    """All metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.refused_calls = RefusedCalls(self.registry, "lesft_server")
        self.refused_requests = RefusedRequests(self.registry, "lesft_server")
        self.limits = limit_hits(self.registry, "lesft_server")

    def watch(self, engine: Engine, generation: Generation, models: ModelService) -> None:
        """Show what these do from now on; read when asked, on the event loop."""
        self.registry.register(engine.clock.seconds)
        self.registry.register(engine.account.counter)
        self.registry.register(_RunCollector(engine.run))
        self.registry.register(_ClientCollector(engine))
        self.registry.register(_KeepingCollector(engine))
        self.registry.register(_GenerationCollector(generation, models))


class _RunCollector(Collector):
    """What the run is and what came of it."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at each scrape."""
        run = self._run
        info = GaugeMetricFamily(
            "lesft_server_run_info", "The run: always 1.", labels=["run_id", "fingerprint"]
        )
        info.add_metric([run.spec.run_id, run.spec.fingerprint()], 1)
        state = GaugeMetricFamily(
            "lesft_server_run_state", "1 for the state that the run is in.", labels=["state"]
        )
        for each in RunState:
            state.add_metric([each.name.lower()], each is run.state)
        yield from (info, state)
        yield _gauge("paused", "1 while an operator has paused the run.", run.paused)
        yield _gauge("disk_wait", "1 while training waits for room on disk.", bool(run.obstacle))
        yield _counter("rounds", "Rounds done.", len(run.rounds))
        yield _gauge("rounds_planned", "Rounds of the whole run.", run.spec.rounds)
        yield _counter("steps", "Steps that the model has gone through.", run.steps)
        yield from self._last_round()

    def _last_round(self) -> Iterator[Metric]:
        if not self._run.rounds:
            return
        last = self._run.rounds[-1]
        yield _gauge("loss", "Loss of the last round.", last.loss)
        yield _gauge("nll", "-log P per target token of the last round, in nats.", last.nll)
        yield _gauge("round_seconds", "Length of the last round.", last.seconds)
        if last.class_counts is not None:
            classes = GaugeMetricFamily(
                "lesft_server_class_tokens", "Target tokens of the last round.", labels=["class"]
            )
            for token_class, count in zip(TokenClass, last.class_counts, strict=True):
                classes.add_metric([token_class.name.lower()], count)
            yield classes


class _ClientCollector(Collector):
    """The clients of the run, and no others: a client that was dropped has no series any more."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at each scrape."""
        run, due = self._engine.run, self._engine.cohort.due()
        members = run.members.values()
        connected = sum(member.connected for member in members)
        yield _gauge("clients", "Clients connected: sessions that are open.", connected)
        yield _gauge("clients_joined", "Clients of the run so far.", len(members))
        yield _gauge("clients_planned", "Clients that the run is for.", run.spec.clients)
        here = _by_client("client_connected", "1 while the client has a session.")
        awaited = _by_client(
            "client_awaited", "1 while the next step waits for this client's part."
        )
        silent = _by_client("client_silent_seconds", "Since the client was last heard of.")
        resumed = CounterMetricFamily(
            "lesft_server_client_resumptions", "How often the client came back.", labels=["client"]
        )
        for member in members:
            name = [member.client_id]
            here.add_metric(name, member.connected)
            awaited.add_metric(name, run.state is RunState.TRAINING and member.client_id in due)
            resumed.add_metric(name, member.resumed)
            if member.last_seen:
                silent.add_metric(name, max(0.0, time.time() - member.last_seen))
        yield from (here, awaited, silent, resumed)

        wire = CounterMetricFamily(
            "lesft_server_wire_bytes",
            "Bytes of training streams by client, direction (up: from the client) and kind.",
            labels=["client", "direction", "kind"],
        )
        for member in members:
            for direction, kinds in member.wire.by_kind().items():
                for kind, count in kinds.items():
                    wire.add_metric([member.client_id, direction, kind], count)
        yield wire
        waiting = self._engine.cohort.num_waiting
        yield _gauge("micro_batches_waiting", "Those that wait for other clients'.", waiting)
        intake = self._engine.intake
        yield _gauge(
            "receiving_bytes", "Memory held for what is being received.", intake.used_bytes
        )
        most = intake.limit_bytes
        yield _gauge("receiving_limit_bytes", "Most of it; the rest waits.", most)
        waiting = intake.num_waiting
        yield _gauge("receiving_waiting", "Bundles that wait for such memory.", waiting)


class _KeepingCollector(Collector):
    """What the server keeps on disk."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at each scrape."""
        journal = self._engine.journal
        yield _gauge(
            "checkpoint_age_seconds",
            "What a crash now would cost: since the newest checkpoint, or else since the start.",
            time.monotonic() - journal.safe_since,
        )
        if journal.checkpoint_seconds is not None:
            yield _gauge(
                "checkpoint_seconds",
                "How long the newest checkpoint took.",
                journal.checkpoint_seconds,
            )
        yield _gauge(
            "ledger_bytes", "Disk in use for answers since then.", journal.ledger.num_bytes
        )
        yield _gauge(
            "kept_activation_bytes",
            "Disk in use for activations of clients that do not train.",
            self._engine.samples.num_bytes,
        )
        yield _gauge(
            "remembered_bytes",
            "Memory in use for labels and reference probabilities that need not be sent again.",
            self._engine.back.memory.num_bytes,
        )


class _GenerationCollector(Collector):
    """Split decoding, and the front that is handed out."""

    def __init__(self, generation: Generation, models: ModelService) -> None:
        self._generation = generation
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at each scrape."""
        generation = self._generation
        batches, steps = generation.batches
        reserved = generation.bytes_reserved
        yield _gauge("sequences", "Texts being written.", len(generation.sequences))
        yield _gauge("cache_bytes_reserved", "Memory reserved for keys and values.", reserved)
        yield _counter(
            "decoded_tokens", "Tokens through the back for inference.", generation.tokens
        )
        yield _counter("decode_batches", "Batches of them.", batches)
        yield _counter("decode_steps", "Steps in these.", steps)
        sent = self._models.front_bytes_sent
        yield _counter("front_sent_bytes", "Bytes of front weights handed out.", sent)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"lesft_server_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"lesft_server_{name}", text, value=value)


def _by_client(name: str, text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"lesft_server_{name}", text, labels=["client"])
