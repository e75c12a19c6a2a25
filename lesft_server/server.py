"""The server as a whole: loads the model, serves, stops gracefully."""

import asyncio
import gc
import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import grpc
import torch

from lesft.adapter_halves import ADAPTER_FILE, SPEC_FILE
from lesft.adapters import attach_lora
from lesft.back import Back
from lesft.call_limits import CallLimiter
from lesft.channel import set_serving
from lesft.control import ControlServer, write_endpoints
from lesft.device import choose_device
from lesft.device_thread import DeviceThread
from lesft.errors import InvalidInput, Unreachable
from lesft.files import lock_folder, write_atomically
from lesft.hub import model_folder
from lesft.identity.attestation import Attester
from lesft.identity.expiry import show_expiry
from lesft.identity.listeners import bind_grpc, control_server, endpoints_of, grpc_server
from lesft.identity.security import IDENTITY_FOLDER, Security
from lesft.intake import Intake
from lesft.live import LivePage
from lesft.logs import note_process
from lesft.norms import ActivationNorms
from lesft.sample_memory import SampleMemory
from lesft.spec import RunSpec
from lesft.split import (
    check_cut_layer,
    check_personal_layers,
    checkpoint_gradients,
    default_cut_layer,
)
from lesft.step_messages import Limits
from lesft.v1 import inference_pb2_grpc, model_pb2_grpc, training_pb2_grpc
from lesft.weights import Checkpoint, FrontFile, front_fingerprint, load_back
from lesft_server import inference_service, model_service, training_service
from lesft_server.adapter_hand_out import AdapterHandOut
from lesft_server.cohort import Cohort
from lesft_server.control_api import make_app
from lesft_server.device_account import DeviceAccount
from lesft_server.generation import Generation
from lesft_server.journal import Journal, drop_journal
from lesft_server.metrics import Metrics
from lesft_server.planning import AcceptedPlan, Planning, as_planned, keep_plan
from lesft_server.run import Run
from lesft_server.sample_store import SampleStore
from lesft_server.session import Engine
from lesft_server.settings import ServerSettings
from lesft_server.step_clock import StepClock

log = logging.getLogger(__name__)

_GRACE_SECONDS = 5


class Server:
    """Everything of one server process but its signals."""

    def __init__(
        self, settings: ServerSettings, on_plan: Callable[[], None] = lambda: None
    ) -> None:
        """`on_plan` hears that a client's plan was taken, and that a new server is to go by it."""
        self._settings = settings
        self._on_plan = on_plan
        self._device = DeviceThread(settings.threads)
        self._server: grpc.aio.Server | None = None
        self._control: ControlServer | None = None
        self._journal: Journal | None = None
        self._lock: int | None = None
        self._security: Security | None = None
        self._live = LivePage()
        self._metrics = Metrics()
        self.engine: Engine | None = None

    async def start(self) -> tuple[str, str]:
        """Load the model and serve; returns the addresses of gRPC and control API.

        Raises LesftError when that cannot be.
        """
        self._lock = lock_folder(self._settings.state, "server")
        settings = self._settings = as_planned(self._settings)
        security = self._security = Security.of(settings, "server")
        self._live.start()
        checkpoint = Checkpoint(model_folder(settings.model))
        back, spec = await self._device.run(lambda: _load(settings, checkpoint))
        engine = self.engine = await self._resume(back, spec)
        front_file = FrontFile(checkpoint, spec.cut_layer)
        adapter_file = settings.state / ADAPTER_FILE
        generation = _generation(settings, engine)
        planning = Planning(
            engine,
            checkpoint.config.num_hidden_layers,
            self._take_plan if settings.accept_plans else None,
        )
        adapter = AdapterHandOut(engine.run, adapter_file, settings.share_adapter)
        # In a thread: it reads the front's tensors from disk.
        models = await asyncio.to_thread(
            model_service.ModelService,
            spec,
            checkpoint.config_json,
            front_file,
            adapter,
            generation.max_context,
            planning,
        )

        self._metrics.watch(engine, generation, models)
        names = [
            training_service.SERVICE_NAME,
            model_service.SERVICE_NAME,
            inference_service.SERVICE_NAME,
        ]
        self._limiter = CallLimiter(settings, self._metrics.limits)
        server, health = grpc_server(
            names, security, self._metrics.refused_calls.count, [self._limiter]
        )
        self._server = server
        training_pb2_grpc.add_TrainingServiceServicer_to_server(
            training_service.TrainingService(engine, self._metrics.limits), server
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(models, server)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            inference_service.InferenceService(
                generation,
                spec,
                settings.heartbeat_seconds,
                settings.idle_seconds,
                engine.intake,
                engine.norms,
            ),
            server,
        )
        address = bind_grpc(server, settings, security)
        app = make_app(engine, generation, self._live, self._metrics)
        self._control = control_server(
            app, settings, security, self._metrics.refused_requests.around
        )
        control_address = await self._control.start(settings.control)
        await set_serving(health, names)
        await server.start()
        if security is not None:
            security.start()
            show_expiry(self._metrics.registry, "server", lambda: security.expires)
        write_endpoints(
            settings.state, endpoints_of("server", settings, security, address, control_address)
        )
        scheme = "http" if security is None else "https"
        log.info("ready: gRPC on %s, control API on %s://%s", address, scheme, control_address)
        return address, control_address

    def _take_plan(self, plan: AcceptedPlan) -> None:
        keep_plan(self._settings.state, plan)
        log.info("a client's plan was taken: %s", plan)
        self._on_plan()

    async def _resume(self, back: Back, spec: RunSpec) -> Engine:
        """The engine as the state folder's newest checkpoint has it, or fresh."""
        settings = self._settings
        if settings.fresh:
            drop_journal(settings.state)
        attester = Attester(settings.state / IDENTITY_FOLDER)
        loop, clock = asyncio.get_running_loop(), StepClock(spec.fingerprint())
        note_process(run=spec.run_id)

        def on_wait(reason: str) -> None:
            loop.call_soon_threadsafe(setattr, run, "obstacle", reason)

        try:
            journal = self._journal = Journal(settings.state, spec.fingerprint(), clock, on_wait)
        except InvalidInput as error:
            raise InvalidInput(f"{error}{_difference(settings.state / SPEC_FILE, spec)}") from None
        write_atomically(settings.state / SPEC_FILE, spec.model_dump_json(indent=2).encode())
        newest = journal.newest
        run = Run(spec, newest.facts if newest else None, journal.dropped)
        if newest is not None:
            await self._device.run(lambda: back.load_state(newest.tensors))
            log.info("going on from the checkpoint of round %d", newest.round)
        account = DeviceAccount()
        cohort = Cohort(
            run,
            back,
            self._device,
            journal,
            settings.state / ADAPTER_FILE,
            clock,
            attester,
            account,
        )
        if newest is not None:
            cohort.write_adapter(newest)  # as this version writes it; an older one may have before
        # In a thread: it reads what it has kept.
        samples = await asyncio.to_thread(
            SampleStore, settings.state, spec, settings.kept_activations_mib << 20
        )
        return Engine(
            run=run,
            back=back,
            device=self._device,
            journal=journal,
            cohort=cohort,
            samples=samples,
            clock=clock,
            account=account,
            limits=Limits(spec, back.model.config.hidden_size, back.model.config.vocab_size),
            intake=Intake(settings.max_receiving_mib << 20, "--max-receiving-mib"),
            norms=ActivationNorms(
                settings.max_activation_norm, settings.norm_policy, self._metrics.limits
            ),
            heartbeat_seconds=settings.heartbeat_seconds,
            stall_seconds=settings.stall_seconds,
        )

    async def stop(self, reason: str) -> None:
        """Tell the clients why, let calls end, stop. Safe to call when never started.

        The clients wait for the server to be started again.
        """
        if self.engine is not None:
            self.engine.run.hang_up(Unreachable(reason))
            self.engine.cohort.close()
        if self._server is not None:
            await self._server.stop(_GRACE_SECONDS)
        self._live.stop()
        if self._control is not None:
            await self._control.stop()
        if self._security is not None:
            await self._security.stop()
        self._device.close()
        if self._journal is not None:
            self._journal.close()
        if self._lock is not None:
            os.close(self._lock)


def run(settings: ServerSettings) -> None:
    """The command: serve until SIGTERM or SIGINT. Raises LesftError when it cannot start."""
    asyncio.run(serve(settings))


async def serve(settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT. Raises LesftError when it cannot start."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopping.set)
    await serve_until(stopping, settings)


async def serve_until(stopping: asyncio.Event, settings: ServerSettings) -> None:
    """Serve, and begin anew at the same addresses whenever a client's plan was taken."""
    while not stopping.is_set():
        woken = asyncio.Event()
        server = Server(settings, on_plan=woken.set)
        try:
            address, control = await server.start()
            # The model and all that was imported stay; else each full collection would go through
            # it all, while every client waits.
            gc.collect()
            gc.freeze()
            await _any_of(stopping, woken)
            log.info("stopping" if stopping.is_set() else "loading anew")
        finally:
            await server.stop("the server is stopping")
            gc.unfreeze()
        settings = settings.model_copy(
            update={"listen": address, "control": control, "fresh": False}
        )


async def _any_of(*events: asyncio.Event) -> None:
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()


def _load(settings: ServerSettings, checkpoint: Checkpoint) -> tuple[Back, RunSpec]:
    """The back with fresh adapters and the run spec, on the device thread."""
    num_layers = checkpoint.config.num_hidden_layers
    cut_layer = settings.cut_layer or default_cut_layer(num_layers)
    check_cut_layer(cut_layer, num_layers)
    check_personal_layers(settings.personal_layers, cut_layer)
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
    if settings.gradient_checkpointing:
        checkpoint_gradients(model)
    memory = SampleMemory(settings.remembered_mib << 20)
    back = Back(
        model,
        spec,
        settings.precision,
        settings.logits_slice,
        memory=memory,
        most_tokens=settings.batch_tokens,
    )
    return back, spec


def _generation(settings: ServerSettings, engine: Engine) -> Generation:
    own_context = getattr(engine.back.model.config, "max_position_embeddings", settings.max_length)
    return Generation(
        engine.back,
        engine.device,
        settings.max_sequences,
        settings.max_context or own_context,
        settings.cache_mib << 20,
    )


def _difference(file: Path, spec: RunSpec) -> str:
    """Where the spec of an earlier run, as its file has it, differs first; to end a message."""
    try:
        before = json.loads(file.read_text())
    except (OSError, ValueError):
        return ""
    now = spec.model_dump(mode="json")
    name = next((name for name in now if before.get(name) != now[name]), None)
    return f" ({name}: {before.get(name)} then, {now[name]} now)" if name else ""
