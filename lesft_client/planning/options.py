"""What each cut would come to, with which encodings, and which of them to take."""

import math
from collections.abc import Sequence
from typing import get_args

from pydantic import BaseModel, ConfigDict

from lesft.adapter_codec import most_bytes_per_value
from lesft.spec import AdapterEncoding, Encoding, RunSpec
from lesft.split import default_cut_layer
from lesft.tensors import encoded_bytes
from lesft_client.planning.device_speed import DeviceSpeed
from lesft_client.planning.link_speed import LinkSpeed
from lesft_client.planning.memory import MemoryModel
from lesft_client.planning.step_model import Stages, round_seconds
from lesft_client.planning.workload import Tokens, Workload

_MB = 1e6
_TARGET_BYTES = 4
_NEARLY = 1.02
"""Steps that differ by less are as good as each other: more than that no measurement tells."""

_TRAINED_PATH = 2
"""What a token of a path with a gradient costs where one without costs 1: weights are frozen."""


class MeasuredBack(BaseModel):
    """What the server has said of its own speed, and the micro-batch that it was asked about."""

    model_config = ConfigDict(frozen=True)

    fixed_seconds: float
    layer_seconds: float
    tokens: Tokens


class Conditions(BaseModel):
    """All that a cut is judged by."""

    model_config = ConfigDict(frozen=True)

    spec: RunSpec
    num_layers: int
    hidden_size: int
    in_flight: int
    workload: Workload
    device: DeviceSpeed
    memory: MemoryModel
    link: LinkSpeed
    back: MeasuredBack | None
    """None where the server could not measure itself: then it counts as never in the way."""
    memory_mib: float
    """What the client may use; 0 where nobody knows."""
    shallowest_cut: int
    """The least that leaves enough of the model with the client."""


class Option(BaseModel):
    """One cut with its encodings; seconds and megabytes (10^6) are those of a step, or round."""

    model_config = ConfigDict(frozen=True)

    cut_layer: int
    activation_encoding: Encoding
    gradient_encoding: Encoding
    adapter_encoding: AdapterEncoding
    memory_mib: float
    device_seconds: float
    up_seconds: float
    server_seconds: float
    down_seconds: float
    step_seconds: float
    mb_up: float
    mb_down: float
    bottleneck: str
    fits: bool
    is_deep_enough: bool


def option(
    conditions: Conditions,
    cut_layer: int,
    activations: Encoding,
    gradients: Encoding,
    adapters: AdapterEncoding,
) -> Option:
    """What a cut comes to with these encodings."""
    spec, link = conditions.spec, conditions.link
    up_bytes, down_bytes = _micro_batch_bytes(conditions, activations, gradients)
    adapter_bytes = _adapter_bytes(conditions, cut_layer, adapters)
    stages = _stages(conditions, cut_layer, up_bytes, down_bytes, adapter_bytes)
    busy = stages.busy(spec.accumulation, conditions.in_flight)
    busy["uplink"] += adapter_bytes / link.up_bytes_per_second
    busy["downlink"] += adapter_bytes / link.down_bytes_per_second
    memory_mib = conditions.memory.mib(cut_layer, conditions.workload, spec.train_front)
    return Option(
        cut_layer=cut_layer,
        activation_encoding=activations,
        gradient_encoding=gradients,
        adapter_encoding=adapters,
        memory_mib=memory_mib,
        device_seconds=busy["device"],
        up_seconds=busy["uplink"],
        server_seconds=busy["server"],
        down_seconds=busy["downlink"],
        step_seconds=round_seconds(stages, spec.accumulation, conditions.in_flight),
        mb_up=(spec.accumulation * up_bytes + adapter_bytes) / _MB,
        mb_down=(spec.accumulation * down_bytes + adapter_bytes) / _MB,
        bottleneck=max(busy, key=lambda name: busy[name]),
        fits=not conditions.memory_mib or memory_mib <= conditions.memory_mib,
        is_deep_enough=cut_layer >= conditions.shallowest_cut,
    )


def best_option(conditions: Conditions, cut_layer: int) -> Option:
    """A cut with the least lean encodings with which the link does not hold the step up.

    Leaner ones would round more to no purpose; the leanest where the link does all the same.
    Nothing else is done while adapters travel: they go leaner for as long as that shortens a step.
    """
    usable = _leaner_and_leaner(conditions)
    up, down = 0, 0
    while True:
        held_up_by = _window_bottleneck(conditions, cut_layer, usable[up], usable[down])
        if held_up_by == "uplink" and up + 1 < len(usable):
            up += 1
        elif held_up_by == "downlink" and down + 1 < len(usable):
            down += 1
        else:
            break
    chosen, *leaner = (
        option(conditions, cut_layer, usable[up], usable[down], adapters)
        for adapters in _adapter_encodings(conditions.spec)
    )
    for shorter in leaner:
        if shorter.step_seconds * _NEARLY < chosen.step_seconds:
            chosen = shorter
    return chosen


def _window_bottleneck(
    conditions: Conditions, cut_layer: int, activations: Encoding, gradients: Encoding
) -> str:
    """What micro-batches wait for most; adapters travel between windows."""
    sent = _micro_batch_bytes(conditions, activations, gradients)
    stages = _stages(conditions, cut_layer, *sent, adapter_bytes=0.0)
    return stages.bottleneck(conditions.spec.accumulation, conditions.in_flight)


def _adapter_encodings(spec: RunSpec) -> tuple[AdapterEncoding, ...]:
    """Leaner and leaner; the run's own where no adapter travels."""
    return get_args(AdapterEncoding) if spec.aggregates else (spec.adapter_encoding,)


def _leaner_and_leaner(conditions: Conditions) -> list[Encoding]:
    """The encodings that take fewer bytes than those before; not all do at every width."""
    width = conditions.hidden_size
    itemsize = conditions.memory.front.hidden_bytes // width
    leaner: list[Encoding] = []
    least = math.inf
    for encoding in get_args(Encoding):
        if encoding == "int4" and width % 2:
            continue
        size = encoded_bytes(1, width, encoding, itemsize)
        if size < least:
            leaner.append(encoding)
            least = size
    return leaner


def recommended(options: Sequence[Option]) -> Option | None:
    """The shortest step of those that fit and are deep enough; None where there is none.

    Of those that take nearly as long the deepest, which shows the server least.
    """
    eligible = [option for option in options if option.fits and option.is_deep_enough]
    if not eligible:
        return None
    shortest = min(option.step_seconds for option in eligible)
    near = [option for option in eligible if option.step_seconds <= shortest * _NEARLY]
    return max(near, key=lambda option: option.cut_layer)


def shallowest_cut(num_layers: int, allow_shallower: bool) -> int:
    """The least deep cut to recommend: the paper's, a quarter of the layers."""
    return 1 if allow_shallower else default_cut_layer(num_layers)


# ---------------------------------------------------------------------- one micro-batch


def _stages(
    conditions: Conditions,
    cut_layer: int,
    up_bytes: float,
    down_bytes: float,
    adapter_bytes: float,
) -> Stages:
    spec, device, link = conditions.spec, conditions.device, conditions.link
    tokens, fresh = conditions.workload.tokens, conditions.workload.fresh_share
    plain = device.plain_forward.at(cut_layer)
    if not spec.train_front:
        forward, backward, optimizer = fresh * (tokens.base + tokens.reference) * plain, 0.0, 0.0
    else:
        trained, untrained = _trained_tokens(conditions)
        forward = trained * device.forward.at(cut_layer) + fresh * untrained * plain
        backward = trained * device.backward.at(cut_layer)
        optimizer = device.optimizer.at(cut_layer)
    aggregation = 0.0
    if spec.aggregates:
        moved = adapter_bytes * (1 / link.up_bytes_per_second + 1 / link.down_bytes_per_second)
        aggregation = moved + 2 * link.round_trip_seconds / spec.aggregation_interval
    return Stages(
        forward=forward,
        up=up_bytes / link.up_bytes_per_second,
        server=_server_seconds(conditions, cut_layer),
        down=down_bytes / link.down_bytes_per_second,
        backward=backward,
        round_trip=link.round_trip_seconds,
        optimizer=optimizer,
        aggregation=aggregation,
    )


def _trained_tokens(conditions: Conditions) -> tuple[float, float]:
    """Of a micro-batch: tokens of paths with a gradient, and without."""
    tokens = conditions.workload.tokens
    if conditions.spec.loss.trains_reference:
        return tokens.base + tokens.reference, 0.0
    return tokens.base, tokens.reference


def _server_seconds(conditions: Conditions, cut_layer: int) -> float:
    """What was measured, by the tokens of an average micro-batch."""
    back = conditions.back
    if back is None:
        return 0.0
    work = conditions.workload
    reference = _TRAINED_PATH if conditions.spec.loss.trains_reference else 1
    # What a client that does not train sends once, the server computes with each time.
    fresh = work.fresh_share if conditions.spec.train_front else 1.0

    def units(tokens: Tokens, share: float) -> float:
        return _TRAINED_PATH * tokens.base + share * reference * tokens.reference

    seconds = back.fixed_seconds + (conditions.num_layers - cut_layer) * back.layer_seconds
    return seconds * units(work.tokens, fresh) / units(back.tokens, 1.0)


def _micro_batch_bytes(
    conditions: Conditions, activations: Encoding, gradients: Encoding
) -> tuple[float, float]:
    """Bytes up and down of a micro-batch, over the whole run on average."""
    spec, width, work = conditions.spec, conditions.hidden_size, conditions.workload
    itemsize = conditions.memory.front.hidden_bytes // width
    up = encoded_bytes(1, width, activations, itemsize)
    labels = _TARGET_BYTES * work.tokens.targets
    if not spec.train_front:
        tokens = work.tokens.base + work.tokens.reference
        return work.fresh_share * (tokens * up + labels), 0.0
    sent = work.tokens.base + work.fresh_share * work.tokens.reference
    down = encoded_bytes(1, width, gradients, itemsize)
    return sent * up + work.fresh_share * labels, _trained_tokens(conditions)[0] * down


def _adapter_bytes(conditions: Conditions, cut_layer: int, encoding: AdapterEncoding) -> float:
    """Each way, of the round's part in an aggregation."""
    spec = conditions.spec
    if not spec.aggregates:
        return 0.0
    shared = cut_layer - len([layer for layer in spec.personal_layers if layer < cut_layer])
    parameters = shared * conditions.memory.front.adapter_parameters
    return parameters * most_bytes_per_value(encoding) / spec.aggregation_interval
