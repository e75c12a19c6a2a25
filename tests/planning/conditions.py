"""Conditions of a plan in round numbers, for figures that can be worked out by hand."""

from typing import Any

from lesft.spec import LossSpec, RunSpec
from lesft_client.planning.device_speed import Cost, DeviceSpeed
from lesft_client.planning.link_speed import LinkSpeed
from lesft_client.planning.memory import FrontShape, MemoryModel
from lesft_client.planning.options import Conditions, MeasuredBack
from lesft_client.planning.workload import Tokens, Workload
from tests.harness import RAW

MIB = 1 << 20


def run_spec(**changes: Any) -> RunSpec:
    values: dict[str, Any] = {
        "clients": 1,
        "rounds": 10,
        "accumulation": 4,
        "aggregate": False,
        **RAW,
        "loss": LossSpec(token_weights="uniform"),
        "model_name": "tiny",
        "front_fingerprint": "sha256:0",
        "cut_layer": 2,
    }
    return RunSpec(**{**values, **changes})


def conditions(**changes: Any) -> Conditions:
    """A micro-batch is 100 tokens, 20 of them targets, of width 64 in float32: 25,600 bytes.

    Each front layer takes 0.1 s forward and 0.2 s backward of it; each back layer 0.2 s, and the
    rest of the back 0.1 s. The link moves 256,000 bytes a second each way, without delay.
    """
    values: dict[str, Any] = {
        "spec": run_spec(),
        "num_layers": 8,
        "hidden_size": 64,
        "in_flight": 4,
        "workload": Workload(
            tokens=Tokens(100, 0, 20),
            most_tokens=120,
            window_tokens=420,
            window_sent_tokens=420,
            fresh_share=1.0,
        ),
        "device": DeviceSpeed(
            forward=Cost(fixed=0, layer=0.001),
            backward=Cost(fixed=0, layer=0.002),
            plain_forward=Cost(fixed=0, layer=0.0005),
            optimizer=Cost(fixed=0, layer=0),
            micro_batches=3,
        ),
        "memory": MemoryModel(
            process_bytes=300 * MIB,
            front=FrontShape(
                layer_bytes=10 * MIB,
                adapter_parameters=MIB // 16,
                kept_bytes=MIB / 100,
                hidden_bytes=256,
            ),
            gradient_checkpointing=False,
        ),
        "link": LinkSpeed(
            round_trip_seconds=0, up_bytes_per_second=256_000, down_bytes_per_second=256_000
        ),
        "back": MeasuredBack(fixed_seconds=0.1, layer_seconds=0.2, tokens=Tokens(100, 0, 20)),
        "memory_mib": 1000,
        "shallowest_cut": 2,
    }
    return Conditions(**{**values, **changes})
