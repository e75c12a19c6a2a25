"""The server as a whole: loads the model, serves, stops gracefully."""

import asyncio
import logging
import signal
from pathlib import Path

import torch

from lesft.adapters import attach_lora
from lesft.back import Back
from lesft.channel import bind, make_server, set_serving
from lesft.control import ControlServer, write_endpoints
from lesft.device import choose_device
from lesft.hub import model_folder
from lesft.spec import RunSpec
from lesft.split import check_cut_layer, default_cut_layer
from lesft.step_messages import Limits
from lesft.v1 import model_pb2_grpc, training_pb2_grpc
from lesft.weights import Checkpoint, FrontFile, front_fingerprint, load_back
from lesft_server import model_service, training_service
from lesft_server.cohort import Cohort
from lesft_server.control_api import make_app
from lesft_server.device_thread import DeviceThread
from lesft_server.run import Run
from lesft_server.session import Engine
from lesft_server.settings import ServerSettings

log = logging.getLogger(__name__)

ADAPTER_FILE = "adapter.safetensors"
SPEC_FILE = "run_spec.json"
_GRACE_SECONDS = 5


async def serve(settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT. Raises LesftError when it cannot start."""
    settings.state.mkdir(parents=True, exist_ok=True)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopping.set)

    device = DeviceThread()
    checkpoint = Checkpoint(model_folder(settings.model))
    back, spec = await device.run(lambda: _load(settings, checkpoint))
    (settings.state / SPEC_FILE).write_text(spec.model_dump_json(indent=2))
    run = Run(spec)
    cohort = Cohort(run, back, device, settings.state / ADAPTER_FILE)
    config = back.model.config
    limits = Limits(spec, config.hidden_size, config.vocab_size)

    names = [training_service.SERVICE_NAME, model_service.SERVICE_NAME]
    server, health = make_server(names)
    training_pb2_grpc.add_TrainingServiceServicer_to_server(
        training_service.TrainingService(Engine(run, back, device, cohort, limits)), server
    )
    model_pb2_grpc.add_ModelServiceServicer_to_server(
        model_service.ModelService(
            spec, checkpoint.config_json, FrontFile(checkpoint, spec.cut_layer)
        ),
        server,
    )
    control = ControlServer(make_app(run), settings.insecure)
    try:
        address = bind(server, settings.listen, settings.insecure)
        control_address = await control.start(settings.control)
        await server.start()
        await set_serving(health, names)
        write_endpoints(settings.state, {"grpc": address, "control": control_address})
        log.info("ready: gRPC on %s, control API on http://%s", address, control_address)
        await stopping.wait()
        log.info("stopping")
        run.stop("the server is stopping")
    finally:
        await server.stop(_GRACE_SECONDS)
        await control.stop()
        device.close()


def _load(settings: ServerSettings, checkpoint: Checkpoint) -> tuple[Back, RunSpec]:
    """The back with fresh adapters and the run spec, on the device thread."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    num_layers = checkpoint.config.num_hidden_layers
    cut_layer = settings.cut_layer or default_cut_layer(num_layers)
    check_cut_layer(cut_layer, num_layers)
    spec = settings.run_spec(
        Path(settings.model).name if Path(settings.model).exists() else settings.model,
        cut_layer,
        front_fingerprint(checkpoint, cut_layer),
    )
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    device = choose_device(settings.device)
    log.info("loading layers from %d on of %s to %s", cut_layer, settings.model, device)
    model = load_back(checkpoint, cut_layer, dtype, device)
    attach_lora(model, spec.lora, spec.seed, cut_layer)
    return Back(model, spec, settings.precision, settings.logits_slice), spec
