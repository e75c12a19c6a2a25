"""The README.md of an exported adapter or model: what it is, how it was made, how to load it."""

import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from lesft.errors import one_line
from lesft.spec import RunSpec

CARD_FILE = "README.md"

Kind = Literal["adapter", "model"]
"""A PEFT adapter, or a whole model that it was merged into."""

_MAY_REPEAT = "The adapter itself may repeat what it was trained on."

_PACKAGES = ("lesft", "torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True)
class Figures:
    """What training gave, for one client or several together. Losses are in nats per token."""

    clients: int
    samples: int
    loss_first: float | None
    loss_last: float | None
    held_out_tokens: int
    held_out_nll_before: float | None
    held_out_nll_after: float | None
    bytes_up: int
    bytes_down: int


def figures_of(results: Sequence[Mapping[str, Any]]) -> Figures:
    """The figures of clients' result.json; losses are means over clients by their samples.

    Raises KeyError or TypeError for what no client has written.
    """
    losses = [_mean_loss(results, index) for index in range(results[0]["rounds"])]
    known = [loss for loss in losses if loss is not None]
    return Figures(
        clients=len(results),
        samples=sum(result["num_samples"] for result in results),
        loss_first=known[0] if known else None,
        loss_last=known[-1] if known else None,
        held_out_tokens=sum(result["held_out_after"]["tokens"] for result in results),
        held_out_nll_before=_held_out(results, "held_out_before"),
        held_out_nll_after=_held_out(results, "held_out_after"),
        bytes_up=sum(result["bytes_up"] for result in results),
        bytes_down=sum(result["bytes_down"] for result in results),
    )


def _mean_loss(results: Sequence[Mapping[str, Any]], index: int) -> float | None:
    """Of the clients that took part in a round."""
    parts = [
        (result["num_samples"], loss)
        for result in results
        for loss in result["loss_by_round"][index : index + 1]
        if loss is not None
    ]
    total = sum(samples for samples, _ in parts)
    return sum(samples * loss for samples, loss in parts) / total if total else None


def _held_out(results: Sequence[Mapping[str, Any]], name: str) -> float | None:
    tokens = sum(result[name]["tokens"] for result in results)
    return sum(result[name]["nll_sum"] for result in results) / tokens if tokens else None


def model_card(
    kind: Kind, base_model: str, spec: RunSpec, figures: Figures | None, split: bool = True
) -> str:
    """The card, Markdown behind YAML; `base_model` is the base's hub id or name.

    Without `split`, clients with the whole model have trained it.
    """
    name = base_model.rstrip("/").rpartition("/")[2]
    what = "A LoRA adapter for" if kind == "adapter" else "A fine-tuned copy of"
    lines = [
        "---",
        f"base_model: {json.dumps(base_model)}",
        f"library_name: {'peft' if kind == 'adapter' else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags:",
        "- lesft",
        "- lora",
        "---",
        "",
        f"# {_text(name)}, fine-tuned with LESFT",
        "",
        f"{what} {_text(base_model)}, trained by {_clients(spec.clients)} in {spec.rounds} rounds "
        f"{_how(spec, split)}",
        "",
        "## Load it",
        "",
        *_loading(kind, base_model),
        "",
        "## What the server could see",
        "",
        _seen_by_the_server(spec) if split else _seen_without_a_server(spec),
        "",
        *(["## Figures", "", *_figures(spec, figures), ""] if figures else []),
        "## Settings",
        "",
        *_table(("setting", "value"), _settings(spec.model_dump(mode="json"))),
        "",
        "Written by " + ", ".join(f"{name} {number}" for name, number in _versions()) + ".",
    ]
    return "\n".join(lines) + "\n"


def _clients(number: int) -> str:
    return "one client" if number == 1 else f"{number} clients"


def _how(spec: RunSpec, split: bool) -> str:
    """The kind of training, and who trained what."""
    many = spec.clients > 1
    if not split:
        averaged = (
            "; an independent server averaged their adapters" if many and spec.aggregate else ""
        )
        whose = "each with the whole model and its own data" if many else "with the whole model"
        return f"of fine-tuning, {whose}{averaged}."
    own = "" if spec.train_front else ", whose adapter was not trained"
    averaged = " and each kept its own part of the adapter" if many else ""
    if spec.aggregates:
        averaged = " and an independent server averaged the clients' part of the adapter"
        if spec.personal_layers:
            layers = ", ".join(map(str, spec.personal_layers))
            averaged += f", but for layers {layers}, which each kept to itself"
    return (
        "of split federated fine-tuning: each kept its prompts and ran the decoder up to layer "
        f"{spec.cut_layer}{own}, a server ran the rest,{averaged or ' and trained its part'}."
    )


def _loading(kind: Kind, base_model: str) -> list[str]:
    if kind == "model":
        return [
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'folder = "."  # where this file is',
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            "model = AutoModelForCausalLM.from_pretrained(folder)",
            "```",
        ]
    return [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base = {json.dumps(base_model)}  # a hub id, or the folder of the same model",
        'adapter = "."  # the folder of this file',
        "tokenizer = AutoTokenizer.from_pretrained(base)",
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)",
        "```",
    ]


def _seen_by_the_server(spec: RunSpec) -> str:
    reference = " on both its paths" if spec.loss.needs_reference else ""
    return (
        "The prompts and their token ids stayed on the clients. The server received, for every "
        f"sequence{reference}, its length, the activations after layer {spec.cut_layer} and the "
        "token ids of the targets: the answers it could read as they are. Activations of so early "
        "a layer are no encryption: whoever holds them and the model's weights can recover much of "
        f"the prompts from them. {_seen_by_the_aggregator(spec)}"
    )


def _seen_without_a_server(spec: RunSpec) -> str:
    there_is_one = spec.clients > 1 and spec.aggregate
    others = _seen_by_the_aggregator(spec) if there_is_one else _MAY_REPEAT
    return f"No server took part: data and activations stayed where they were. {others}"


def _seen_by_the_aggregator(spec: RunSpec) -> str:
    if not spec.aggregates:
        return f"No aggregator took part. {_MAY_REPEAT}"
    return (
        f"The aggregator received the clients' adapters, never activations or labels. {_MAY_REPEAT}"
    )


def _figures(spec: RunSpec, figures: Figures) -> Iterator[str]:
    if figures.clients == spec.clients:
        yield f"Of all {_clients(figures.clients)}." if figures.clients > 1 else "Of its client."
    else:
        yield f"Of {_clients(figures.clients)} of the {spec.clients}, which exported this."
    yield ""
    rows = [
        ("rounds", str(spec.rounds)),
        ("training samples", str(figures.samples)),
        ("training loss, first and last round", _pair(figures.loss_first, figures.loss_last)),
        (
            "held-out -log P per token, before and after",
            _pair(figures.held_out_nll_before, figures.held_out_nll_after),
        ),
        ("held-out tokens", str(figures.held_out_tokens)),
        ("sent and received", f"{_size(figures.bytes_up)}, {_size(figures.bytes_down)}"),
    ]
    yield from _table(("figure", "value"), rows)


def _pair(first: float | None, last: float | None) -> str:
    return "not measured" if first is None or last is None else f"{first:.4f}, {last:.4f}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


def _settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield prefix + name, text


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield f"| {head[0]} | {head[1]} |"
    yield "|---|---|"
    for name, value in rows:
        yield f"| {name} | {_text(value)} |"


def _text(value: str) -> str:
    """Whatever a server named its run or its model, as text of one table cell."""
    text = one_line(value)
    for special in "\\|`<>[]*":
        text = text.replace(special, "\\" + special)
    return text


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for package in _PACKAGES:
        yield package, version(package)
