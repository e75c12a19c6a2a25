"""Which runs a comparison consists of, and where each of them is shown. Loads no torch.

A run that does not depend on the cut, because the model is not split, is run once and shown at
every cut; so are methods that have the same settings under several names, shown under each. The
untuned model answers the same questions, without and with solved examples before them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lesft.errors import InvalidInput
from lesft_testbed.comparison.settings import CompareSettings
from lesft_testbed.data_digest import data_sha256
from lesft_testbed.methods import METHODS, same_method

ZERO_SHOT, FEW_SHOT = "zero-shot", "few-shot"
UNTUNED = (ZERO_SHOT, FEW_SHOT)
"""The rows of the untuned model, which stand beside the methods."""

_ANSWERS_AT_ONCE = 32
"""As in a run's own evaluation: what a model writes may depend on it in the last bits."""

Kind = Literal["training", "untuned"]


class Place(NamedTuple):
    """One setting of the axes: the methods in it are compared with each other."""

    model: str
    data: str
    cut: str
    samples: int
    """Per client."""
    clients: int


@dataclass(frozen=True)
class PlannedRun:
    """One run, which is one command."""

    name: str
    """Its folder, and the same in every plan that has this run."""
    kind: Kind
    method: str
    """A method, or one of UNTUNED."""
    model: str
    data: str
    seed: int
    options: Mapping[str, Any]
    """What its command is given besides `output`, nested ones with dots: `lora.rank`."""
    data_sha256: str = ""
    """Of the data as it lies on disk now; empty where it does not."""


@dataclass(frozen=True)
class Plan:
    """All runs, in the order in which they are run, and the places that show them."""

    runs: tuple[PlannedRun, ...]
    places: tuple[Place, ...]
    methods: tuple[str, ...]
    """The rows of every place: the untuned model first, where questions are asked at all."""
    shown: Mapping[tuple[Place, str, int], str]
    """The name of the run for a place, method and seed."""


def make_plan(settings: CompareSettings, layers: Mapping[str, int], default_model: str) -> Plan:
    """The plan of the settings.

    `layers` has the number of decoder layers by model, as far as they are known; `default_model` is
    the folder that stands for an empty model. Raises InvalidInput where two models or data sets
    have the same name, or a cut does not lie within a model.
    """
    planner = _Planner(settings, layers, default_model)
    places = tuple(planner.places())
    untuned = UNTUNED if settings.questions else ()
    runs: dict[str, PlannedRun] = {}
    shown: dict[tuple[Place, str, int], str] = {}
    for seed in settings.seeds:
        for place, method in product(places, (*untuned, *settings.methods)):
            run = planner.run(place, method, seed)
            runs.setdefault(run.name, run)
            shown[place, method, seed] = run.name
    return Plan(tuple(runs.values()), places, (*untuned, *settings.methods), shown)


class _Planner:
    def __init__(
        self, settings: CompareSettings, layers: Mapping[str, int], default_model: str
    ) -> None:
        self._settings = settings
        self._layers = layers
        self._data_sha256 = {data: data_sha256(data) for data in settings.data}
        self._folders = {(model or default_model): None for model in settings.models}
        for option, values in (("--models", self._folders), ("--data", settings.data)):
            names = [_slug(value) for value in values]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice:
                raise InvalidInput(
                    f"{option} must have values of different names, two are called {twice} in the "
                    "names of runs: rename one, or compare them apart"
                )

    def places(self) -> Iterator[Place]:
        settings = self._settings
        for model, data, cut in product(self._folders, settings.data, settings.cuts):
            for clients in sorted(settings.clients):
                for samples in settings.samples_of(clients):
                    yield Place(model, data, cut, samples, clients)

    def run(self, place: Place, method: str, seed: int) -> PlannedRun:
        untuned = method in UNTUNED
        method = method if untuned else same_method(method, self._settings.methods)
        parts = [method, _slug(place.model), _slug(place.data)]
        if not untuned:
            split = METHODS[method].split
            parts += [f"cut-{place.cut.replace('/', '-')}"] if split else []
            parts += [f"samples-{place.samples}", f"clients-{place.clients}"]
        return PlannedRun(
            name="_".join([*parts, f"seed-{seed}"]),
            kind="untuned" if untuned else "training",
            method=method,
            model=place.model,
            data=place.data,
            seed=seed,
            options=self._untuned_options(place, method, seed)
            if untuned
            else self._training_options(place, method, seed),
            data_sha256=self._data_sha256[place.data],
        )

    def _training_options(self, place: Place, method: str, seed: int) -> dict[str, Any]:
        settings = self._settings
        options: dict[str, Any] = {
            "method": method,
            "model": place.model,
            "data": place.data,
            "seed": seed,
            "clients": place.clients,
            "samples": place.samples,
            "held_out": 0,
            "rounds": 0,
            "epochs": settings.epochs,
            "accumulation": settings.accumulation,
            "batch_size": settings.batch_size,
            "aggregation_interval": settings.aggregation_interval,
            "max_length": settings.max_length,
            "skew": settings.skew,
            "skew_alpha": settings.skew_alpha,
            "questions": settings.questions,
            "measure": settings.measure,
            "measure_before": False,
            "max_tokens": settings.max_tokens,
            "device": settings.device,
            "precision": settings.precision,
            "server_threads": settings.server_threads,
            "client_threads": settings.client_threads,
            "weights": "local",
            # What is compared are methods.
            **dict.fromkeys(("activation_encoding", "gradient_encoding"), "raw"),
            "adapter_encoding": "raw",
            **_flat("lora", settings.lora.model_dump(mode="json")),
            **_flat("optimizer", settings.optimizer.model_dump(mode="json")),
        }
        if METHODS[method].split:
            options["cut_layer"] = self._cut_layer(place)
        return options

    def _untuned_options(self, place: Place, method: str, seed: int) -> dict[str, Any]:
        settings = self._settings
        return {
            "local": True,
            "untuned": True,
            "model": place.model,
            "benchmark": place.data,
            "data_seed": seed,
            "questions": settings.questions,
            "shots": settings.shots if method == FEW_SHOT else 0,
            "measure": settings.measure,
            "max_tokens": settings.max_tokens,
            "batch": _ANSWERS_AT_ONCE,
            "device": settings.device,
            "precision": settings.precision,
            "threads": settings.server_threads,
        }

    def _cut_layer(self, place: Place) -> int:
        """The layers on the client; 0, which is a quarter, where the model's own are not known."""
        layers = self._layers.get(place.model)
        if layers is None:
            if place.cut == "1/4":
                return 0
            if "/" not in place.cut:
                return int(place.cut)
            raise InvalidInput(
                f"--cuts {place.cut} is a part of {place.model}, whose number of layers is not "
                "known here: give numbers of layers"
            )
        cut = layers // int(place.cut[2:]) if "/" in place.cut else int(place.cut)
        if not 1 <= cut < layers:
            raise InvalidInput(
                f"--cuts must lie between 1 and {layers - 1} for {place.model} with its {layers} "
                f"layers, got {place.cut}" + (f", which is {cut}" if "/" in place.cut else "")
            )
        return cut


def short_name(value: str) -> str:
    """A model or data set by the last part of its path, without an ending."""
    return Path(value).name.removesuffix(".jsonl")


def _slug(value: str) -> str:
    return re.sub(r"[^\w.]+|_+", "-", short_name(value).lower()).strip("-.") or "unnamed"


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in values.items()}
