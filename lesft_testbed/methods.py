"""The compared methods (METHOD section 5): one table of presets over independent settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """One row: settings of the testbed's run, each of which can also be set by itself.

    `loss` has the loss options that differ from the defaults, which are LESFT's.
    """

    name: str
    title: str
    loss: Mapping[str, Any] = field(default_factory=dict)
    split: bool = True
    """Clients hold the first layers and a server the rest; if not, each client holds them all."""
    pooled: bool = False
    """One node has all clients' data."""
    train_front: bool = True
    aggregate: bool = True

    def settings(self) -> dict[str, Any]:
        """Values of the run's settings, nested as they are."""
        return {
            "split": self.split,
            "pooled": self.pooled,
            "train_front": self.train_front,
            "aggregate": self.aggregate,
            "loss": dict(self.loss),
        }


def _uniform(weight: float) -> dict[str, Any]:
    return {"token_weights": "uniform", "uniform_weight": weight}


_CROSS_ENTROPY = _uniform(1.0)
_CONTIGUOUS = {"clustering": "contiguous"}
_REFERENCE_ONLY = {**_uniform(0.0), "reference_nll_weight": 1.0}
_ONCE = {"reference_refresh": 0}
_OWN_PROBABILITY = {"token_weights": "probability"}

_ROWS = (
    # The systems that the paper compares.
    Method("lesft", "LESFT: split, both paths, adaptive token weights"),
    Method("splitlora", "SplitLoRA: split, cross-entropy", _CROSS_ENTROPY),
    Method(
        "sl",
        "split learning: split, cross-entropy, no aggregation",
        _CROSS_ENTROPY,
        aggregate=False,
    ),
    Method(
        "splitfrozen",
        "SplitFrozen: split, cross-entropy, clients train nothing",
        _CROSS_ENTROPY,
        train_front=False,
    ),
    Method("fedavg", "FedAvg: whole model on each client, cross-entropy", _CROSS_ENTROPY, False),
    Method(
        "centralized",
        "centralized: one node with all data, cross-entropy",
        _CROSS_ENTROPY,
        split=False,
        pooled=True,
        aggregate=False,
    ),
    # Ablations of LESFT.
    Method("lesft-sl", "LESFT without aggregation", aggregate=False),
    Method("lesft-fl", "LESFT without split: whole model on each client", split=False),
    Method("base-only", "base path only: cross-entropy", _CROSS_ENTROPY),
    Method("reference-only", "reference path only: cross-entropy on it", _REFERENCE_ONLY),
    Method("uniform-0", "weight 0 for every token: trains nothing", _uniform(0.0)),
    *(
        Method(f"uniform-{weight:g}", f"weight {weight:g} for every token", _uniform(weight))
        for weight in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    ),
    Method("lesft-contiguous", "LESFT, sub-salient tokens grown from salient ones", _CONTIGUOUS),
    Method("lesft-once", "LESFT, each sample's reference path taken once in the run", _ONCE),
    # A control that the paper lacks; the other, cross-entropy on the same targets, is splitlora.
    Method("dft", "DFT: split, weight is the token's own probability", _OWN_PROBABILITY),
)

METHODS: Mapping[str, Method] = {method.name: method for method in _ROWS}
DEFAULT_METHOD = "lesft"


def same_method(name: str, among: Sequence[str]) -> str:
    """The first row of the table, of those `among`, that has the same settings: often itself."""
    same = (
        method.name
        for method in _ROWS
        if method.name in among and method.settings() == METHODS[name].settings()
    )
    return next(same, name)
