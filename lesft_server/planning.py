"""What the server tells and takes before a run begins: its speed, and another cut."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lesft.errors import Busy, HandshakeMismatch, InvalidInput, NotAllowed, OutOfOrder
from lesft.files import write_atomically
from lesft.quantization import QUANTIZED, layout
from lesft.spec import AdapterEncoding, Encoding
from lesft.spec_messages import adapter_encoding, encoding_name
from lesft.split import check_cut_layer, check_personal_layers, default_cut_layer
from lesft.step_messages import Limits, check_lengths
from lesft.v1 import model_pb2, training_pb2
from lesft_server.back_speed import BackSpeed, Lengths, measure_back
from lesft_server.handshake import check_protocol_version
from lesft_server.run import RunState
from lesft_server.session import Engine
from lesft_server.settings import ServerSettings

log = logging.getLogger(__name__)

PLAN_FILE = "accepted-plan.json"
_SHARE_OF_DEVICE = 5
"""Measuring may take one part in so many of the device's time, whoever asks."""


class AcceptedPlan(BaseModel):
    """What a client's plan has changed of the run that the server was started for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cut_layer: int = Field(ge=1)
    activation_encoding: Encoding
    gradient_encoding: Encoding
    adapter_encoding: AdapterEncoding


class Planning:
    """Of one run. Lives on the event loop."""

    def __init__(
        self,
        engine: Engine,
        num_layers: int,
        accept: Callable[[AcceptedPlan], None] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`num_layers` are the whole model's; `accept` begins the run anew, where that may be."""
        self._engine = engine
        self._num_layers = num_layers
        self._accept = accept
        self._clock = clock
        self._measuring = False
        self._free_at = 0.0

    # ------------------------------------------------------------------ speed

    async def measure_back(
        self, request: model_pb2.MeasureBackRequest
    ) -> model_pb2.MeasureBackResponse:
        """See model.proto. Raises InvalidInput for lengths that no micro-batch may have, Busy."""
        check_protocol_version(request.protocol_version)
        lengths = self._checked(request)
        wait = self._free_at - self._clock()
        if self._measuring or wait > 0:
            raise Busy(
                "the server's speed was measured just now, which keeps others waiting: ask again "
                f"in {max(wait, 1):.0f} s"
            )
        self._measuring, began = True, self._clock()
        try:
            speed: BackSpeed = await self._engine.device.run(
                lambda: measure_back(self._engine.back, lengths)
            )
        finally:
            ended = self._clock()
            self._free_at = ended + (ended - began) * (_SHARE_OF_DEVICE - 1)
            self._measuring = False
        return model_pb2.MeasureBackResponse(
            fixed_seconds=speed.fixed_seconds, layer_seconds=speed.layer_seconds
        )

    def _checked(self, request: model_pb2.MeasureBackRequest) -> Lengths:
        """The lengths, which must be those of a micro-batch that brings all its samples anew."""
        limits = self._engine.limits
        loss = limits.spec.loss.model_copy(update={"reference_refresh": 1})
        spec = limits.spec.model_copy(update={"loss": loss})
        header = training_pb2.MicroBatch(
            base_lengths=request.base_lengths,
            reference_lengths=request.reference_lengths,
            target_lengths=request.target_lengths,
        )
        check_lengths(header, Limits(spec, limits.hidden_size, limits.vocab_size))
        return Lengths(
            tuple(request.base_lengths),
            tuple(request.reference_lengths),
            tuple(request.target_lengths),
        )

    # ------------------------------------------------------------------ another cut

    def apply(self, request: model_pb2.ApplyPlanRequest) -> None:
        """See model.proto. Raises NotAllowed, OutOfOrder, HandshakeMismatch or InvalidInput."""
        check_protocol_version(request.protocol_version)
        if self._accept is None:
            raise NotAllowed(
                "this server takes no plans: ask its operator to start it with --accept-plans, or "
                "with the options that the plan names"
            )
        self._check_not_begun()
        ours, theirs = self._engine.run.spec.fingerprint(), request.spec_fingerprint[:80]
        if ours != theirs:
            raise HandshakeMismatch(
                f"spec_fingerprint: server {ours}, plan {theirs or 'none'}; the run has changed "
                "since the plan was made: make it again"
            )
        self._accept(self._accepted(request))

    def _check_not_begun(self) -> None:
        run = self._engine.run
        if run.state is not RunState.WAITING or self._engine.journal.has_begun:
            raise OutOfOrder(
                f"the run has begun ({run.state.value}): its cut and its encodings stay as they are"
            )
        if run.members:
            raise OutOfOrder(
                f"clients have joined already ({', '.join(sorted(run.members))}): the run's cut "
                "and its encodings stay as they are"
            )

    def _accepted(self, request: model_pb2.ApplyPlanRequest) -> AcceptedPlan:
        """The plan, checked as the server's own options are.

        A cut that leaves less than a quarter of the layers with the clients shows the server more
        of their text, that of other clients, too: only the operator may choose one.
        """
        spec, cut = self._engine.run.spec, request.cut_layer
        check_cut_layer(cut, self._num_layers)
        check_personal_layers(spec.personal_layers, cut)
        shallowest = min(spec.cut_layer, default_cut_layer(self._num_layers))
        if cut < shallowest:
            raise NotAllowed(
                f"cut_layer must be at least {shallowest} in a plan, got {cut}: ask the server's "
                "operator, who may choose any"
            )
        try:
            plan = AcceptedPlan.model_validate(
                {
                    "cut_layer": cut,
                    "activation_encoding": encoding_name(request.activation_encoding),
                    "gradient_encoding": encoding_name(request.gradient_encoding),
                    "adapter_encoding": adapter_encoding(request.adapter_encoding),
                }
            )
        except ValidationError as error:
            wrong = error.errors()[0]
            raise InvalidInput(
                f"{wrong['loc'][0]} is none that this server knows, got {wrong['input']!r}"
            ) from None
        for encoding in {plan.activation_encoding, plan.gradient_encoding} & QUANTIZED:
            layout(1, self._engine.limits.hidden_size, encoding)
        return plan


# ---------------------------------------------------------------------- kept beside the run's state


def keep_plan(state: Path, plan: AcceptedPlan) -> None:
    """Write the plan to the state folder: the server started again goes by it."""
    write_atomically(state / PLAN_FILE, plan.model_dump_json(indent=2).encode())


def as_planned(settings: ServerSettings) -> ServerSettings:
    """The settings as the plan in the state folder has them, if there is one.

    With --fresh it is dropped. Raises InvalidInput for a file that is none.
    """
    file = settings.state / PLAN_FILE
    if settings.fresh:
        file.unlink(missing_ok=True)
    if not file.exists():
        return settings
    try:
        plan = AcceptedPlan.model_validate_json(file.read_bytes())
    except ValidationError:
        raise InvalidInput(f"{file} holds no plan that can be read: start with --fresh") from None
    log.info("going by the plan in %s: %s", file, plan)
    return settings.model_copy(update=plan.model_dump())
