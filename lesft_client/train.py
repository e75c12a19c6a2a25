"""`lesft-client train`: from settings to a finished run, one paragraph per stage."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from lesft.adapter_halves import SPEC_FILE
from lesft.control import write_endpoints
from lesft.cpu_threads import compute_on_this_thread
from lesft.errors import InvalidInput, LesftError
from lesft.files import lock_folder, write_atomically
from lesft.identity.expiry import show_expiry
from lesft.identity.settings import Service
from lesft.live import LivePage
from lesft.logs import note_process
from lesft.model_card import figures_of
from lesft.spec import RunSpec
from lesft.tensors import encode_tensors
from lesft.wire import WireCounter
from lesft_client.aggregation import Aggregator
from lesft_client.back import BackLink, Rejoin, Turn
from lesft_client.connector import Connector, own_client_id
from lesft_client.control_api import make_app
from lesft_client.counted_progress import wants_bar
from lesft_client.data import EncodedSample, Sample, Split, label_counts
from lesft_client.data_command import samples_of
from lesft_client.enrol import enrol_where_needed
from lesft_client.front import Front
from lesft_client.link import Patience
from lesft_client.local_run import LocalRun
from lesft_client.metrics import Metrics
from lesft_client.own_listener import control_server
from lesft_client.progress import ProgressDisplay
from lesft_client.recovery import ClientCheckpoints, drop_state
from lesft_client.renewal import renewing
from lesft_client.run_samples import SERVERS_OPTION, check_vocabulary, encode_for_run
from lesft_client.split_run import SplitRun
from lesft_client.status import RESULT_FILE, Status
from lesft_client.tokenizer import load_tokenizer
from lesft_client.train_settings import TrainSettings
from lesft_client.trainer import HeldOut, Trainer

_HELD_OUT_BEFORE = "held_out_before"


class TrainCommand:
    """One client of one run, from its first call to its result."""

    def __init__(self, settings: TrainSettings) -> None:
        self._settings = settings
        self._wire = WireCounter()
        enrol_where_needed(settings.enrol_with, settings.identity)
        services: dict[str, Service] = {
            settings.server: "server",
            settings.aggregator: "aggregator",
        }
        self._connectors = {
            address: Connector(address, settings, service)
            for address, service in services.items()
            if address
        }
        name = own_client_id(settings.client_id, list(self._connectors.values()))
        self._status = Status(name, self._wire)
        self._live = LivePage()
        self._display = ProgressDisplay(
            self._status,
            wants_bar(settings.progress),
            self._live.events.note,
            as_log=settings.log_format == "json",
        )
        self._patience = Patience(
            settings.patience_seconds, settings.reconnect_seconds, settings.stall_seconds
        )
        self._seconds: dict[str, float] = {}
        self._samples_by_label: dict[str, int] = {}

    def run(self) -> None:
        """Train to the end of the run. Raises LesftError for whatever ends it early."""
        settings = self._settings
        lock = lock_folder(settings.state, "client")
        if settings.fresh:
            drop_state(settings.state)
        metrics = Metrics(self._status)
        identities = [c.identity for c in self._connectors.values() if c.identity is not None]
        if identities:
            show_expiry(
                metrics.registry,
                "client",
                lambda: min(identity.expires() for identity in identities),
            )
        app = make_app(self._status, self._live, metrics.registry)
        control = control_server(app, settings, metrics.refused.around)
        try:
            self._live.start()
            address = control.start_in_thread(settings.control)
            write_endpoints(settings.state, {"control": address})
            self._display.say(f"to watch: {control.scheme}://{address}/")
            with renewing(list(self._connectors.values())):
                self._run()
        finally:
            self._live.stop()
            control.stop_thread()
            os.close(lock)

    def _run(self) -> None:
        settings, start = self._settings, time.monotonic()
        compute_on_this_thread(settings.threads)
        run: SplitRun | LocalRun = (
            LocalRun(settings, self._status.client_id)
            if settings.local
            else SplitRun(
                settings,
                self._status,
                self._display,
                self._patience,
                self._connectors[settings.server],
            )
        )
        spec = run.describe()
        self._status.run_id, self._status.rounds = spec.run_id, spec.rounds
        note_process(run=spec.run_id, client=self._status.client_id)
        training, held_out = self._samples(spec)
        front = run.load(spec)
        vocab_size = front.model.config.vocab_size
        check_vocabulary([*training, *held_out], vocab_size, settings.model, spec)

        checkpoints = ClientCheckpoints(
            settings.state,
            spec.fingerprint(),
            training,
            self._status,
            self._wire,
            self._display.waiting,
        )

        def interrupt() -> None:
            if averaging is not None:
                averaging.interrupt()

        link = run.link(front, training, checkpoints, on_turn=interrupt)
        averaging = self._averaging(spec, len(training), link.check)
        trainer = Trainer(
            front,
            link,
            averaging,
            training,
            self._status,
            1 if settings.local else settings.in_flight,  # here there is no latency to hide
            checkpoints,
        )
        try:
            if averaging is not None:
                averaging.join()
            turn = self._begin(spec, link, trainer, checkpoints)
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
            if averaging is not None:
                averaging.close()
        link.leave("")
        before = HeldOut(**checkpoints.carried[_HELD_OUT_BEFORE])
        self._status.phase = "finished"
        result = self._result(trainer, front, before, after)
        state = settings.state
        write_atomically(state / SPEC_FILE, spec.model_dump_json(indent=2).encode())
        run.write_adapter(front, trainer.round, figures_of([result]))
        write_atomically(state / RESULT_FILE, json.dumps(result, indent=2).encode())
        self._display.say(f"finished; adapter and figures are in {state}")

    def _averaging(
        self, spec: RunSpec, num_samples: int, still_wanted: Callable[[], None]
    ) -> Aggregator | None:
        """The aggregator, where this client has anything to average with others."""
        settings = self._settings
        if not spec.aggregates or (settings.local and spec.clients == 1):
            if settings.aggregator:
                self._display.say("this run averages no adapters: --aggregator is not used")
            return None
        if not settings.aggregator:
            raise InvalidInput(
                "this run averages its clients' adapters: give --aggregator HOST:PORT"
            )
        return Aggregator(
            self._connectors[settings.aggregator].open,
            f"aggregator {settings.aggregator}",
            self._status.client_id,
            spec.run_id,
            spec.fingerprint_of_clients(),
            num_samples,
            spec.adapter_encoding,
            self._patience,
            self._wire,
            still_wanted=still_wanted,
            on_waiting=self._display.waiting,
        )

    def _begin(
        self, spec: RunSpec, link: BackLink, trainer: Trainer, checkpoints: ClientCheckpoints
    ) -> Turn | None:
        """Open the link and restore what was kept; returns where the back wants us."""
        kept = checkpoints.rounds()
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
        if spec.clients > 1 and not self._settings.local:
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
        option = "--run.max-length" if settings.local else SERVERS_OPTION

        def encoded(split: Split, samples: list[Sample]) -> list[EncodedSample]:
            kept = encode_for_run(
                samples, split, tokenizer, spec, settings.max_length, option, self._display.say
            )
            self._status.skipped_samples += len(samples) - len(kept)
            return kept

        samples = samples_of(settings, "train")
        self._samples_by_label = label_counts(samples, settings.skew)
        training = encoded("train", samples)
        self._status.num_samples = len(training)
        if not settings.held_out:
            return training, []
        return training, encoded("test", samples_of(settings, "test"))

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

    def _result(
        self, trainer: Trainer, front: Front, before: HeldOut, after: HeldOut
    ) -> dict[str, Any]:
        """What came of the run, for result.json."""
        parameters, trained = front.num_parameters()
        return {
            **self._status.body().model_dump(
                exclude={"phase", "waiting_for", "seconds_left", "loss"}
            ),
            # Of the tensors as they travel: the aggregator names its average so, too.
            "adapter_sha256": hashlib.sha256(encode_tensors(front.adapter(), "raw")).hexdigest(),
            "parameters": parameters,
            "trained_parameters": trained,
            "samples_by_label": self._samples_by_label,
            "held_out_before": asdict(before),
            "held_out_after": asdict(after),
            "wire": self._wire.by_kind(),
            "seconds": {**self._seconds, **trainer.timer.seconds},
        }


def train(settings: TrainSettings) -> None:
    """Train to the end of the run. Raises LesftError for whatever ends it early."""
    TrainCommand(settings).run()
