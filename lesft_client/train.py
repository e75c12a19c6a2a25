"""`lesft-client train`: from settings to a finished run, one paragraph per stage."""

import hashlib
import json
import os
import socket
import time
from dataclasses import asdict
from typing import Any

import torch

from lesft.adapter_halves import ADAPTER_FILE, SPEC_FILE, AdapterHalf, HalfInfo, encode_half
from lesft.adapters import attach_lora
from lesft.channel import open_channel
from lesft.control import ControlServer, write_endpoints
from lesft.errors import DataError, LesftError, ModelError
from lesft.files import lock_folder, write_atomically
from lesft.spec import PROTOCOL_VERSION, RunSpec
from lesft.spec_messages import encoding_to_message, lora_to_message, spec_from_message
from lesft.step_messages import Limits
from lesft.tensors import encode_tensors
from lesft.v1 import model_pb2, model_pb2_grpc, training_pb2
from lesft_client.aggregation import Aggregator
from lesft_client.back import Rejoin, Turn
from lesft_client.control_api import make_app
from lesft_client.counted_progress import wants_bar
from lesft_client.data import EncodedSample, Split, encode_samples
from lesft_client.data_command import samples_of
from lesft_client.front import Front
from lesft_client.link import Patience, ServerLink
from lesft_client.progress import ProgressDisplay
from lesft_client.recovery import ClientCheckpoints, drop_state, instance_id
from lesft_client.run_front import describe_run, load_run_front
from lesft_client.settings import TrainSettings
from lesft_client.status import RESULT_FILE, Status
from lesft_client.tokenizer import load_tokenizer
from lesft_client.trainer import HeldOut, Trainer
from lesft_client.wire import WireCounter

_HELD_OUT_BEFORE = "held_out_before"


class TrainCommand:
    """One client of one run, from its first call to its result."""

    def __init__(self, settings: TrainSettings) -> None:
        self._settings = settings
        self._wire = WireCounter()
        self._status = Status(settings.client_id or socket.gethostname(), self._wire)
        self._display = ProgressDisplay(self._status, wants_bar(settings.progress))
        self._server = f"server {settings.server}"
        self._patience = Patience(
            settings.patience_seconds, settings.reconnect_seconds, settings.stall_seconds
        )
        self._seconds: dict[str, float] = {}

    def run(self) -> None:
        """Train to the end of the run. Raises LesftError for whatever ends it early."""
        settings = self._settings
        lock = lock_folder(settings.state, "client")
        if settings.fresh:
            drop_state(settings.state)
        control = ControlServer(make_app(self._status), settings.insecure)
        try:
            address = control.start_in_thread(settings.control)
            write_endpoints(settings.state, {"control": address})
            self._run()
        finally:
            control.stop_thread()
            os.close(lock)

    def _run(self) -> None:
        settings, start = self._settings, time.monotonic()
        if settings.threads:
            torch.set_num_threads(settings.threads)
        with open_channel(settings.server, settings.insecure) as channel:
            models = model_pb2_grpc.ModelServiceStub(channel)
            description = describe_run(models, self._server, settings.patience_seconds, self._wire)
            spec = spec_from_message(description.spec)
            self._status.run_id, self._status.rounds = spec.run_id, spec.rounds
            training, held_out = self._samples(spec)
            front, fingerprint = self._front(models, description, spec)
        self._check_vocabulary([*training, *held_out], front, spec)

        checkpoints = ClientCheckpoints(
            settings.state,
            spec.fingerprint(),
            training,
            self._status,
            self._wire,
            self._display.waiting,
        )
        link = ServerLink(
            lambda: open_channel(settings.server, settings.insecure),
            self._opening(spec, fingerprint, len(training)),
            Limits(spec, front.model.config.hidden_size, front.model.config.vocab_size),
            self._server,
            self._wire,
            self._patience,
            checkpoints.rounds,
            on_turn=lambda: averaging.interrupt(),
            on_waiting=self._display.waiting,
            on_reconnect=self._status.reconnected,
        )
        averaging = Aggregator(
            lambda: open_channel(settings.aggregator, settings.insecure),
            f"aggregator {settings.aggregator}",
            self._status.client_id,
            spec.run_id,
            len(training),
            self._patience,
            self._wire,
            still_wanted=link.check,
            on_waiting=self._display.waiting,
        )
        trainer = Trainer(
            front, link, averaging, training, self._status, settings.in_flight, checkpoints
        )
        try:
            turn = self._begin(spec, link, averaging, trainer, checkpoints)
            self._seconds["preparing"] = time.monotonic() - start
            after = self._train(spec, trainer, checkpoints, held_out, turn)
        except KeyboardInterrupt:
            link.leave("stopped by its user")
            raise
        except LesftError as error:
            link.leave(str(error))
            raise
        except Exception:
            link.leave("it failed; its own log has the details")
            raise
        finally:
            averaging.close()
        link.leave("")
        self._finish(trainer, front, HeldOut(**checkpoints.carried[_HELD_OUT_BEFORE]), after)

    def _begin(
        self,
        spec: RunSpec,
        link: ServerLink,
        averaging: Aggregator,
        trainer: Trainer,
        checkpoints: ClientCheckpoints,
    ) -> Turn | None:
        """Join both services and restore what was kept; returns where the server wants us."""
        kept = checkpoints.rounds()
        averaging.join()
        turn = link.open()
        if kept:
            begin = kept[-1] if isinstance(turn, Rejoin) else turn.round
            checkpoints.restore_status(begin)
            if isinstance(turn, Rejoin):  # else the turn itself loads it
                trainer.restore(begin)
            self._display.say(f"resumed at round {turn.round + 1} of {spec.rounds}")
            return turn
        if isinstance(turn, Rejoin):
            self._display.say(f"joined at round {turn.round + 1} of {spec.rounds}")
            return turn
        link.resume(turn.round)
        if spec.clients > 1:
            self._display.say(f"joined; the run begins when all its {spec.clients} clients have")
        return None

    def _train(
        self,
        spec: RunSpec,
        trainer: Trainer,
        checkpoints: ClientCheckpoints,
        held_out: list[EncodedSample],
        turn: Turn | None,
    ) -> HeldOut:
        """Score, train, score; wherever the server goes on, which may change at any moment."""
        while True:
            try:
                if turn is not None:
                    trainer.turn(turn)
                    turn = None
                if _HELD_OUT_BEFORE not in checkpoints.carried:
                    before = self._score(trainer, held_out, _HELD_OUT_BEFORE)
                    checkpoints.carried[_HELD_OUT_BEFORE] = asdict(before)
                    trainer.save()
                with self._display.phase("training", spec.rounds):
                    trainer.train(self._display.round_done)
                self._seconds["training"] = self._status.training_seconds()
                return self._score(trainer, held_out, "held_out_after")
            except Turn as new:
                turn = new
                self._display.say(f"going on at round {turn.round + 1}")

    # ------------------------------------------------------------------ before training

    def _samples(self, spec: RunSpec) -> tuple[list[EncodedSample], list[EncodedSample]]:
        """This client's training and held-out samples, encoded."""
        settings = self._settings
        tokenizer = load_tokenizer(settings.model)
        max_length = min(settings.max_length or spec.max_length, spec.max_length)

        def encoded(split: Split) -> list[EncodedSample]:
            samples = samples_of(settings, split)
            try:
                kept, skipped = encode_samples(samples, tokenizer, max_length)
            except DataError as error:
                if max_length < spec.max_length:
                    raise
                raise DataError(
                    f"{error}; {max_length} is the run's limit, which its server sets by "
                    "--max-length"
                ) from None
            self._status.skipped_samples += skipped
            if skipped:
                self._display.say(
                    f"{skipped} of {len(samples)} {split} samples are longer than {max_length} "
                    "tokens and were skipped (--max-length)"
                )
            return kept

        training = encoded("train")
        self._status.num_samples = len(training)
        return training, encoded("test") if settings.held_out else []

    def _front(
        self,
        models: model_pb2_grpc.ModelServiceStub,
        description: model_pb2.DescribeRunResponse,
        spec: RunSpec,
    ) -> tuple[Front, str]:
        """The front of the run with fresh adapters, and the fingerprint of its weights."""
        settings = self._settings
        model, fingerprint = load_run_front(
            models, description, settings, self._server, self._wire, self._display
        )
        attach_lora(model, spec.lora, spec.seed, 0)
        return Front(model, spec, self._status.client_id, settings.precision), fingerprint

    def _check_vocabulary(self, samples: list[EncodedSample], front: Front, spec: RunSpec) -> None:
        """Raises ModelError when the tokenizer cannot be the model's."""
        largest = max(max(s.base_ids + s.reference_ids + s.target_ids) for s in samples)
        num_tokens = front.model.config.vocab_size
        if largest >= num_tokens:
            raise ModelError(
                f"--model {self._settings.model}: its tokenizer gives token {largest}, but the "
                f"run's model knows {num_tokens} tokens only: use the tokenizer of "
                f"{spec.model_name}"
            )

    def _opening(
        self, spec: RunSpec, fingerprint: str, num_samples: int
    ) -> training_pb2.OpenSession:
        """What this client is and insists on, for the server to compare with its run."""
        settings = self._settings
        required_lora = settings.lora.model_dump(exclude_unset=True) if settings.lora else {}
        return training_pb2.OpenSession(
            protocol_version=PROTOCOL_VERSION,
            client_id=self._status.client_id,
            run_id=spec.run_id,
            front_fingerprint=fingerprint,
            cut_layer=settings.cut_layer or spec.cut_layer,
            lora=lora_to_message(spec.lora.model_copy(update=required_lora)),
            activation_encoding=encoding_to_message(
                settings.activation_encoding or spec.activation_encoding
            ),
            gradient_encoding=encoding_to_message(
                settings.gradient_encoding or spec.gradient_encoding
            ),
            num_samples=num_samples,
            instance_id=instance_id(settings.state),
        )

    # ------------------------------------------------------------------ around training

    def _score(self, trainer: Trainer, held_out: list[EncodedSample], name: str) -> HeldOut:
        if not held_out:
            return HeldOut(0.0, 0)
        start = time.monotonic()
        with self._display.phase(f"scoring {len(held_out)} held-out samples", len(held_out)):
            score = trainer.score(held_out, self._display.advance)
        self._seconds[name] = time.monotonic() - start
        self._display.say(f"held-out -log P per token: {score.nll_sum / score.tokens:.4f}")
        return score

    def _finish(self, trainer: Trainer, front: Front, before: HeldOut, after: HeldOut) -> None:
        """Leave the adapter, the run it is of and the figures in the state folder."""
        state, spec = self._settings.state, front.spec
        info = HalfInfo.of(spec, "front", rounds=trainer.round)
        half = AdapterHalf(info, front.adapter())
        write_atomically(state / SPEC_FILE, spec.model_dump_json(indent=2).encode())
        write_atomically(state / ADAPTER_FILE, encode_half(half))
        self._status.phase = "finished"
        result: dict[str, Any] = {
            **self._status.body().model_dump(
                exclude={"phase", "waiting_for", "seconds_left", "loss"}
            ),
            # Of the tensors as they travel: the aggregator names its average so, too.
            "adapter_sha256": hashlib.sha256(encode_tensors(half.tensors, "raw")).hexdigest(),
            "held_out_before": asdict(before),
            "held_out_after": asdict(after),
            "wire": self._wire.by_kind(),
            "seconds": {**self._seconds, **trainer.timer.seconds},
        }
        write_atomically(state / RESULT_FILE, json.dumps(result, indent=2).encode())
        self._display.say(f"finished; adapter and figures are in {state}")


def train(settings: TrainSettings) -> None:
    """Train to the end of the run. Raises LesftError for whatever ends it early."""
    TrainCommand(settings).run()
