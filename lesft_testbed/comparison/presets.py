"""The paper's tables and figures as plans of runs: one table. Loads no torch.

A preset's values are defaults of `CompareSettings`: explicit options go before them. `paper` is the
paper's scale (METHOD section 1), for a cluster; `small` ends on two cores overnight or sooner.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

Preset = Literal["none", "table1", "table2", "table3", "fig3", "fig4", "fig5", "fig6", "fig7"]
Scale = Literal["small", "paper"]

SIX_SYSTEMS = ("lesft", "splitlora", "sl", "splitfrozen", "fedavg", "centralized")
_SPLIT_SYSTEMS = ("lesft", "splitlora", "sl", "splitfrozen")
_UNIFORM = tuple(f"uniform-{weight}" for weight in ("0", "0.25", "0.5", "0.75", "1", "1.5", "2"))

PAPER_MODELS = ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-3B")
"""The base models: the paper wants no influence of instruction tuning."""

LAYERS = dict(zip(PAPER_MODELS, (24, 28, 36), strict=True))
"""Their decoder layers, so that a plan needs no download."""


class ScaleValues(TypedDict):
    """What every preset of a scale begins with: all that `CompareSettings` has no other value of.

    A type of its own, so that none can be left out for another scale's to take its place.
    """

    models: tuple[str, ...]
    data: tuple[str, ...]
    seeds: tuple[int, ...]
    cuts: tuple[str, ...]
    samples: tuple[int, ...]
    clients: tuple[int, ...]
    epochs: int
    accumulation: int
    batch_size: int
    aggregation_interval: int
    max_length: int
    lora: dict[str, Any]
    optimizer: dict[str, Any]
    questions: int
    max_tokens: int
    shots: int
    precision: Literal["fp32", "bf16"]
    server_threads: int
    client_threads: int


_LORA = {
    "rank": 8,
    "alpha": 16.0,
    "dropout": 0.2,
    "target_modules": ("gate_proj", "up_proj", "down_proj"),
}
_ADAMW = {"schedule": "constant", "warmup_rounds": 0, "weight_decay": 0.0, "max_grad_norm": 1.0}

SMALL: ScaleValues = {
    "models": ("",),
    "data": ("wordproblems",),
    "seeds": (0, 1, 2),
    "cuts": ("1/4",),
    "samples": (40,),
    "clients": (4,),
    "epochs": 3,
    "accumulation": 1,  # few samples: else there would be hardly any optimizer steps
    "batch_size": 1,
    "aggregation_interval": 5,
    "max_length": 1024,
    "lora": _LORA,
    "optimizer": {**_ADAMW, "learning_rate": 5e-4},
    "questions": 200,
    "max_tokens": 160,
    "shots": 4,
    "precision": "fp32",
    "server_threads": 1,
    "client_threads": 1,
}
"""Also the defaults of `CompareSettings`."""

PAPER: ScaleValues = {
    "models": PAPER_MODELS,
    "data": ("gsm8k",),
    "seeds": (0, 1, 2),
    "cuts": ("1/4",),
    "samples": (200,),
    "clients": (4,),
    "epochs": 10,
    "accumulation": 4,
    "batch_size": 1,
    "aggregation_interval": 5,
    "max_length": 1024,
    "lora": _LORA,
    "optimizer": {**_ADAMW, "learning_rate": 5e-5},
    "questions": 1319,
    "max_tokens": 512,
    "shots": 4,
    "precision": "bf16",
    "server_threads": 0,
    "client_threads": 1,
}

_SCALES: Mapping[str, ScaleValues] = {"small": SMALL, "paper": PAPER}

_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "table1": {"methods": SIX_SYSTEMS},
    "table2": {"methods": SIX_SYSTEMS, "seeds": (0,), "epochs": 1, "questions": 0},
    "table3": {"methods": ("lesft", *_UNIFORM)},
    "fig3": {"methods": _SPLIT_SYSTEMS, "cuts": ("1/2", "1/3", "1/4", "1/5")},
    "fig4": {"methods": SIX_SYSTEMS, "samples": (10, 20, 30, 40, 50)},
    "fig5": {"methods": SIX_SYSTEMS, "clients": (1, 2, 3, 4, 5), "total_samples": 800},
    "fig6": {"methods": ("lesft", "lesft-sl", "lesft-fl")},
    "fig7": {"methods": ("lesft", "base-only", "reference-only")},
}

_OF_BOTH: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("table1", "small"): {"seeds": (0, 1, 2, 3, 4)},
    ("table1", "paper"): {"data": ("gsm8k", "commonsense_qa", "aqua_rat")},
    ("table3", "small"): {"seeds": (0, 1, 2, 3, 4)},
    ("fig3", "small"): {"samples": (10,)},
    ("fig4", "small"): {"samples": (10, 20, 40)},
    ("fig5", "small"): {"clients": (1, 2, 4), "total_samples": 40},
    ("fig6", "small"): {"seeds": (0, 1, 2, 3, 4)},
    ("fig7", "small"): {"seeds": (0, 1, 2, 3, 4)},
}
"""Where a preset at one scale differs from itself at the other."""

_AXES_OF_EACH_OTHER = ({"samples", "total_samples"},)
"""Settings that exclude each other: one that is given takes the preset's other away."""


def preset_defaults(preset: str, scale: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a preset at a scale, beside the settings that are `given` explicitly.

    Unknown names give no defaults: the settings' own validation refuses them.
    """
    defaults: dict[str, Any] = {
        **_SCALES.get(scale, {}),
        **_PRESETS.get(preset, {}),
        **_OF_BOTH.get((preset, scale), {}),
    }
    if preset in _PRESETS and preset != "none":
        defaults["output"] = f"runs/{preset}"
    if "total_samples" in defaults:
        del defaults["samples"]
    for names in _AXES_OF_EACH_OTHER:
        if names & given.keys():
            defaults = {name: value for name, value in defaults.items() if name not in names}
    return defaults
