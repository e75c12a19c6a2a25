"""The paper's tables and figures as plans of runs: one table. Loads no torch.

A preset's values are defaults of `CompareSettings`: explicit options go before them. `paper` is the
paper's scale (METHOD section 1), for a cluster; `small` ends on two cores overnight or sooner.
"""

from collections.abc import Mapping
from typing import Any, Literal

Preset = Literal["none", "table1", "table2", "table3", "fig3", "fig4", "fig5", "fig6", "fig7"]
Scale = Literal["small", "paper"]

SIX_SYSTEMS = ("lesft", "splitlora", "sl", "splitfrozen", "fedavg", "centralized")
_SPLIT_SYSTEMS = ("lesft", "splitlora", "sl", "splitfrozen")
_UNIFORM = tuple(f"uniform-{weight}" for weight in ("0", "0.25", "0.5", "0.75", "1", "1.5", "2"))

PAPER_MODELS = ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-3B")
"""The base models: the paper wants no influence of instruction tuning."""

LAYERS = dict(zip(PAPER_MODELS, (24, 28, 36), strict=True))
"""Their decoder layers, so that a plan needs no download."""

_SCALES: Mapping[str, Mapping[str, Any]] = {
    "small": {
        "models": ("",),
        "data": ("wordproblems",),
        "seeds": (0, 1, 2),
        "samples": (40,),
        "epochs": 3,
        "accumulation": 1,  # few samples: else there would be hardly any optimizer steps
        "aggregation_interval": 5,
        "server_threads": 1,
        "questions": 200,
        "max_tokens": 160,
        "optimizer": {"learning_rate": 5e-4},
    },
    "paper": {
        "models": PAPER_MODELS,
        "data": ("gsm8k",),
        "seeds": (0, 1, 2),
        "samples": (200,),
        "epochs": 10,
        "aggregation_interval": 5,
        "questions": 1319,
        "max_tokens": 512,
        "optimizer": {"learning_rate": 5e-5},
    },
}
"""What every preset of a scale begins with."""

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
    defaults = {
        **_SCALES.get(scale, {}),
        **_PRESETS.get(preset, {}),
        **_OF_BOTH.get((preset, scale), {}),
    }
    if "total_samples" in defaults:
        del defaults["samples"]
    for names in _AXES_OF_EACH_OTHER:
        if names & given.keys():
            defaults = {name: value for name, value in defaults.items() if name not in names}
    return defaults
