"""A run whose back is on a server: what it is, the front, and the link to the back."""

from collections.abc import Callable, Sequence

from lesft.adapter_halves import ADAPTER_FILE, AdapterHalf, HalfInfo, encode_half
from lesft.adapters import attach_lora
from lesft.files import write_atomically
from lesft.model_card import Figures
from lesft.spec import PROTOCOL_VERSION, RunSpec
from lesft.spec_messages import encoding_to_message, lora_to_message, spec_from_message
from lesft.split import checkpoint_gradients
from lesft.step_messages import Limits
from lesft.v1 import model_pb2, model_pb2_grpc, training_pb2
from lesft_client.connector import Connector
from lesft_client.data import EncodedSample
from lesft_client.front import Front
from lesft_client.link import Patience, ServerLink
from lesft_client.progress import ProgressDisplay
from lesft_client.recovery import ClientCheckpoints, instance_id
from lesft_client.run_front import describe_run, load_run_front
from lesft_client.status import Status
from lesft_client.train_settings import TrainSettings


class SplitRun:
    """The server's run, as one client takes part in it. Calls go in the order of the methods."""

    def __init__(
        self,
        settings: TrainSettings,
        status: Status,
        display: ProgressDisplay,
        patience: Patience,
        connector: Connector,
    ) -> None:
        self._connector = connector
        self._settings = settings
        self._status = status
        self._display = display
        self._patience = patience
        self._party = f"server {settings.server}"
        self._description = model_pb2.DescribeRunResponse()
        self._fingerprint = ""

    def describe(self) -> RunSpec:
        """The run. Raises Unreachable when the server does not answer."""
        settings = self._settings
        with self._connector.open() as channel:
            self._description = describe_run(
                model_pb2_grpc.ModelServiceStub(channel),
                self._party,
                settings.patience_seconds,
                self._status.wire,
            )
        return spec_from_message(self._description.spec)

    def load(self, spec: RunSpec) -> Front:
        """The front with fresh adapters, fetched from the server where needed."""
        settings = self._settings
        with self._connector.open() as channel:
            model, self._fingerprint = load_run_front(
                model_pb2_grpc.ModelServiceStub(channel),
                self._description,
                settings,
                self._party,
                self._status.wire,
                self._display,
            )
        attach_lora(model, spec.lora, spec.seed, 0)
        if settings.gradient_checkpointing:
            checkpoint_gradients(model)
        return Front(model, spec, self._status.client_id, settings.precision)

    def link(
        self,
        front: Front,
        training: Sequence[EncodedSample],
        checkpoints: ClientCheckpoints,
        on_turn: Callable[[], None],
    ) -> ServerLink:
        """The back over gRPC; see `ServerLink` for `on_turn`."""
        config = front.model.config
        return ServerLink(
            self._connector.open,
            self._opening(front.spec, training),
            Limits(front.spec, config.hidden_size, config.vocab_size),
            self._party,
            self._status.wire,
            self._patience,
            checkpoints.rounds,
            on_turn=on_turn,
            on_waiting=self._display.waiting,
            on_reconnect=self._status.reconnected,
        )

    def write_adapter(self, front: Front, rounds: int, figures: Figures) -> None:
        """The front's half of the adapter, for generation and export."""
        half = AdapterHalf(HalfInfo.of(front.spec, "front", rounds), front.adapter())
        write_atomically(self._settings.state / ADAPTER_FILE, encode_half(half))

    def _opening(
        self, spec: RunSpec, training: Sequence[EncodedSample]
    ) -> training_pb2.OpenSession:
        """What this client is and insists on, for the server to compare with its run."""
        settings = self._settings
        required_lora = settings.lora.model_dump(exclude_unset=True) if settings.lora else {}
        return training_pb2.OpenSession(
            protocol_version=PROTOCOL_VERSION,
            client_id=self._status.client_id,
            run_id=spec.run_id,
            front_fingerprint=self._fingerprint,
            cut_layer=settings.cut_layer or spec.cut_layer,
            lora=lora_to_message(spec.lora.model_copy(update=required_lora)),
            activation_encoding=encoding_to_message(
                settings.activation_encoding or spec.activation_encoding
            ),
            gradient_encoding=encoding_to_message(
                settings.gradient_encoding or spec.gradient_encoding
            ),
            num_samples=len(training),
            instance_id=instance_id(settings.state, training),
        )
