"""The opening handshake: what both must agree on, refused by name, and where a client goes on."""

from collections.abc import Callable
from dataclasses import dataclass

from lesft.errors import HandshakeMismatch, InvalidInput
from lesft.inference_messages import MAX_TOP_LOGITS, sampling_from_message
from lesft.micro_batch import StepKey
from lesft.spec import CLIENT_ID, MAX_NUM_SAMPLES, PROTOCOL_VERSION, RunSpec
from lesft.spec_messages import encoding_name
from lesft.v1 import inference_pb2, training_pb2
from lesft_server.generation import SequenceOptions

MAX_INSTANCE_ID = 64

MAX_CHECKPOINTS = 64
"""Checkpoints that a client may name; it keeps two."""

_MAX_SHOWN = 200
"""Characters of what a client has sent that a refusal repeats."""


def check_protocol_version(version: int) -> None:
    """Raises HandshakeMismatch for any version but ours."""
    _check("protocol_version", PROTOCOL_VERSION, version, "install the same LESFT on both sides")


def check_opening(opening: training_pb2.OpenSession, spec: RunSpec) -> None:
    """Compare what a client has built with the run. Raises HandshakeMismatch or InvalidInput."""
    check_protocol_version(opening.protocol_version)
    if not CLIENT_ID.fullmatch(opening.client_id):
        raise InvalidInput(
            "client_id must be 1 to 64 letters, digits, '.', '_' or '-', got "
            f"{opening.client_id[:80]!r}"
        )
    if opening.num_samples < 1:
        raise InvalidInput("num_samples must be at least 1, got 0: the client has no data")
    if opening.num_samples > MAX_NUM_SAMPLES:
        raise InvalidInput(
            f"num_samples must be at most {MAX_NUM_SAMPLES}, got {opening.num_samples}"
        )
    if len(opening.checkpoint_rounds) > MAX_CHECKPOINTS:
        raise InvalidInput(
            f"checkpoint_rounds must have at most {MAX_CHECKPOINTS} entries, got "
            f"{len(opening.checkpoint_rounds)}"
        )
    _check("run_id", spec.run_id, opening.run_id, "join the run that the server names")
    _check("cut_layer", spec.cut_layer, opening.cut_layer, "leave the client's --cut-layer out")
    for name, ours in spec.lora:
        theirs = getattr(opening.lora, name)
        theirs = tuple(theirs) if isinstance(ours, tuple) else theirs
        _check(f"lora.{name}", ours, theirs, "leave the client's LoRA options out")
    _check_front_fingerprint(spec, opening.front_fingerprint)
    for name in ("activation_encoding", "gradient_encoding"):
        theirs = encoding_name(getattr(opening, name))
        _check(name, getattr(spec, name), theirs, f"leave the client's {name} out")
    if len(opening.instance_id) > MAX_INSTANCE_ID:
        raise InvalidInput(
            f"instance_id must have at most {MAX_INSTANCE_ID} characters, got "
            f"{len(opening.instance_id)}"
        )


def check_sequence(
    opening: inference_pb2.OpenSequence, spec: RunSpec, rounds: int
) -> SequenceOptions:
    """What a client asks for, once it is certain that both halves belong together.

    `rounds` is how many the server has trained. Raises HandshakeMismatch or InvalidInput.
    """
    check_protocol_version(opening.protocol_version)
    _check("cut_layer", spec.cut_layer, opening.cut_layer, "ask the server for its run")
    _check_front_fingerprint(spec, opening.front_fingerprint)
    theirs = encoding_name(opening.activation_encoding)
    _check("inference_encoding", spec.inference_encoding, theirs, "ask the server for its run")
    untuned = not opening.spec_fingerprint
    if not untuned:
        _check(
            "spec_fingerprint",
            spec.fingerprint(),
            opening.spec_fingerprint,
            "the client's adapter is of another run: give the --state that it trained with, or "
            "use --untuned",
        )
        _check(
            "rounds",
            rounds,
            opening.rounds,
            "the adapters of client and server belong together after the last round only: wait "
            "until the run has finished, or use --untuned",
        )
    if opening.capacity < 1:
        raise InvalidInput("capacity must be at least 1 token, got 0")
    if opening.top_logits > MAX_TOP_LOGITS:
        raise InvalidInput(f"top_logits must be at most {MAX_TOP_LOGITS}, got {opening.top_logits}")
    sampling = sampling_from_message(opening.sampling)
    return SequenceOptions(untuned, opening.capacity, sampling, opening.top_logits)


@dataclass(frozen=True)
class ResumePoint:
    """Where a client goes on, and how it gets there."""

    key: StepKey
    course: training_pb2.Course.ValueType


def resume_point(
    opening: training_pb2.OpenSession,
    can_go_on_at: Callable[[StepKey], bool],
    first_round: int,
    next_key: StepKey,
    rejoins_at: Callable[[], int | None],
) -> ResumePoint:
    """Where a client goes on, on a server whose next step is `next_key`.

    `can_go_on_at` says whether the server has the client's answers from a key on, which it may have
    from `first_round` on. A client that stands where it can goes on there; one that stands
    elsewhere, or has just been started, goes to the newest of its checkpoints where it can. When
    there is none it rejoins at the round that `rejoins_at` gives, if the others go on without it.
    Else raises HandshakeMismatch.
    """
    if opening.HasField("position"):
        position = StepKey(opening.position.round, opening.position.micro)
        if can_go_on_at(position):
            return ResumePoint(position, training_pb2.COURSE_CONTINUE)
    checkpoints = list(opening.checkpoint_rounds) or [0]
    usable = [r for r in checkpoints if can_go_on_at(StepKey(r, 0))]
    if usable:
        return ResumePoint(StepKey(max(usable), 0), training_pb2.COURSE_GO_BACK)
    round_index = rejoins_at()
    if round_index is not None:
        return ResumePoint(StepKey(round_index, 0), training_pb2.COURSE_REJOIN)
    theirs = ",".join(map(str, checkpoints))
    raise HandshakeMismatch(
        f"checkpoint_rounds: server {first_round} to {next_key.round}, client {theirs}; give the "
        "client, or the server, the --state that it had before, or start everybody anew with "
        "--fresh"
    )


def _check_front_fingerprint(spec: RunSpec, theirs: str) -> None:
    _check(
        "front_fingerprint",
        spec.front_fingerprint,
        theirs,
        "the client's weights or config are not the server's; let it fetch them with "
        "--weights server",
    )


def _check(name: str, server: object, client: object, way_out: str) -> None:
    if server != client:
        raise HandshakeMismatch(
            f"{name}: server {_text(server)}, client {_text(client)}; {way_out}"
        )


def _text(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return (text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}...") or "none"
