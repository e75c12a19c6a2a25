"""The front of a run, ready to compute: what the server says of it, and its weights."""

from transformers import PreTrainedModel

from lesft.allocator import return_large_blocks
from lesft.device import choose_device
from lesft.interceptors import remote_errors
from lesft.spec import PROTOCOL_VERSION
from lesft.v1 import model_pb2, model_pb2_grpc
from lesft.weights import front_fingerprint, load_frugal_front
from lesft.wire import WireCounter
from lesft_client.front_weights import fetched_checkpoint, local_checkpoint
from lesft_client.patience import patiently
from lesft_client.progress import ProgressDisplay
from lesft_client.settings import LanguageModelSettings
from lesft_client.train_settings import TrainSettings


def describe_run(
    models: model_pb2_grpc.ModelServiceStub,
    party: str,
    patience_seconds: float,
    wire: WireCounter,
) -> model_pb2.DescribeRunResponse:
    """The server's run. Raises Unreachable when it does not answer."""
    request = model_pb2.DescribeRunRequest(protocol_version=PROTOCOL_VERSION)

    def call() -> model_pb2.DescribeRunResponse:
        with remote_errors(party):
            return models.DescribeRun(request)

    description = patiently(call, patience_seconds)
    wire.add("up", "other", request.ByteSize())
    wire.add("down", "other", description.ByteSize())
    return description


def load_run_front(
    models: model_pb2_grpc.ModelServiceStub,
    description: model_pb2.DescribeRunResponse,
    settings: TrainSettings | LanguageModelSettings,
    party: str,
    wire: WireCounter,
    display: ProgressDisplay,
) -> tuple[PreTrainedModel, str]:
    """The front without adapters, fetched from the server where needed, and its fingerprint.

    Raises ModelError or HandshakeMismatch for weights that cannot be used.
    """
    cut_layer = description.spec.cut_layer
    checkpoint = local_checkpoint(settings.model, settings.weights)
    if checkpoint is not None:
        fingerprint = front_fingerprint(checkpoint, cut_layer)
    else:
        megabytes = description.front_bytes // 1_000_000
        with display.phase(f"getting the front ({megabytes} MB)", megabytes):
            checkpoint = fetched_checkpoint(
                models,
                description,
                settings.cache,
                party,
                settings.patience_seconds,
                wire,
                lambda done, total: display.advance(done // 1_000_000),
            )
        fingerprint = description.spec.front_fingerprint  # it was verified
    if settings.precision != "fp32" or (
        isinstance(settings, TrainSettings) and settings.gradient_checkpointing
    ):
        return_large_blocks()  # in both cases memory is short, not time
    device = choose_device(settings.device)
    return load_frugal_front(checkpoint, cut_layer, settings.precision, device), fingerprint
