"""Methods as the services run them, in this process: real sockets, no tokenizer, no texts."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lesft.adapters import lora_state
from lesft.channel import open_channel
from lesft.spec import RunOptions
from lesft.wire import WireCounter
from lesft_client.aggregation import Aggregator
from lesft_client.back import BackLink
from lesft_client.data import EncodedSample, sample_index
from lesft_client.front import Front
from lesft_client.link import Patience
from lesft_client.local_run import LocalRun
from lesft_client.recovery import ClientCheckpoints
from lesft_client.status import Status
from lesft_client.train_settings import TrainSettings
from lesft_client.trainer import Trainer
from lesft_testbed.settings import RunSettings
from tests.client.harness import running_aggregator
from tests.harness import (
    RAW,
    back_model,
    limits_of,
    make_front,
    open_session,
    running_server,
    server_settings,
)
from tests.training.plain_losses import SALIENT, SIMILARITY
from tests.training.plain_methods import (
    ACCUMULATION,
    AGGREGATION_INTERVAL,
    CUT,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    ROUNDS,
    Outcome,
    State,
)

SEED = 7

Data = Sequence[Sequence[EncodedSample]]


def settings_of(method: str, clients: int) -> RunSettings:
    """The testbed's settings of a method, as those who train see them."""
    settings: dict[str, Any] = {
        "method": method,
        "clients": clients,
        "rounds": ROUNDS,
        "accumulation": ACCUMULATION,
        "aggregation_interval": AGGREGATION_INTERVAL,
        "cut_layer": CUT,
        "max_length": 64,
        "seed": SEED,
        **RAW,
        "lora": {"dropout": 0.0},
        "loss": {"salient_threshold": SALIENT, "cluster_similarity": SIMILARITY},
        "optimizer": {"learning_rate": LEARNING_RATE, "max_grad_norm": MAX_GRAD_NORM},
    }
    return RunSettings(**settings).as_trained()


@dataclass
class Client:
    """One client, ready to train."""

    front: Front
    link: BackLink
    samples: Sequence[EncodedSample]
    status: Status

    def train(self, aggregator: str) -> None:
        """To the end of the run. Whether anything is averaged, the run's own settings say."""
        averaging = Aggregator(
            lambda: open_channel(aggregator),
            f"aggregator {aggregator}",
            self.status.client_id,
            self.front.spec.run_id,
            self.front.spec.fingerprint_of_clients(),
            len(self.samples),
            self.front.spec.adapter_encoding,
            Patience(first_contact=10, reconnect=10, stall=60),
            self.status.wire,
        )
        try:
            averaging.join()
            Trainer(self.front, self.link, averaging, self.samples, self.status).train()
            self.link.leave("")
        finally:
            averaging.close()


@dataclass
class MethodRuns:
    """Runs of one model. Methods whose settings are the same share theirs."""

    model: Path
    folder: Path
    _done: dict[str, Outcome] = field(default_factory=dict)

    def outcome(self, method: str, data: Data) -> Outcome:
        """What came of the run of a method on the data of its clients."""
        settings = settings_of(method, len(data))
        if settings.clients < len(data):
            data = [[sample for samples in data for sample in samples]]
        options = settings.model_dump(include=set(RunOptions.model_fields))
        key = repr((settings.split, options, [len(samples) for samples in data]))
        if key not in self._done:
            folder = self.folder / f"run-{len(self._done)}"
            run = train_split if settings.split else train_whole
            with running_aggregator(folder / "aggregator", len(data)) as aggregator:
                self._done[key] = run(self.model, folder, options, data, aggregator)
        return self._done[key]


def train_split(
    model: Path, folder: Path, options: Mapping[str, Any], data: Data, aggregator: str
) -> Outcome:
    """Fronts on the clients and the back on a server, over gRPC."""
    settings = server_settings(model, folder / "server", **options, cut_layer=CUT, threads=1)
    with running_server(settings) as server, ExitStack() as sessions:
        spec, clients = server.spec, []
        for index, samples in enumerate(data):
            name = name_of(index)
            link, close = open_session(
                server.grpc, limits_of(spec), client_id=name, num_samples=len(samples)
            )
            sessions.callback(close)
            status = Status(name, WireCounter())
            clients.append(Client(make_front(model, spec, name), link, samples, status))
        train_together(clients, aggregator)
        back = lora_state(back_model(server), CUT)
    return outcome_of(clients, back)


def train_whole(
    model: Path, folder: Path, options: Mapping[str, Any], data: Data, aggregator: str
) -> Outcome:
    """The whole model on each client."""
    clients = []
    for index, samples in enumerate(data):
        settings = TrainSettings.model_validate(
            {
                "local": True,
                "run": options,
                "model": str(model),
                "data": "of this test",
                "aggregator": aggregator,
                "cut_layer": CUT,
                "state": folder / name_of(index),
                "device": "cpu",
            }
        )
        run, status = LocalRun(settings, name_of(index)), Status(name_of(index), WireCounter())
        front = run.load(run.describe())
        checkpoints = ClientCheckpoints(
            settings.state, front.spec.fingerprint(), samples, status, status.wire, lambda why: None
        )
        link = run.link(front, samples, checkpoints, on_turn=lambda: None)
        clients.append(Client(front, link, samples, status))
    train_together(clients, aggregator)
    return outcome_of(clients, back={})


def train_together(clients: Sequence[Client], aggregator: str) -> None:
    """Each in a thread of its own."""
    with ThreadPoolExecutor(len(clients)) as pool:
        for _ in pool.map(lambda client: client.train(aggregator), clients):
            pass


def outcome_of(clients: Sequence[Client], back: State) -> Outcome:
    """Of all rounds, none of which any client has missed."""
    return Outcome(
        [{**client.front.adapter(), **back} for client in clients],
        [[loss for loss in client.status.loss_by_round if loss is not None] for client in clients],
        [client.status.class_counts_by_round for client in clients],
    )


def name_of(client: int) -> str:
    return f"client-{client}"


def draw(client: int, position: int, num_samples: int) -> int:
    """The sample that a client draws at a position."""
    return sample_index(SEED, name_of(client), position, num_samples)
