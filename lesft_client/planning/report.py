"""A plan, whole: plan.json, and what the page and the terminal say of it."""

from collections.abc import Sequence
from importlib.metadata import version

from pydantic import BaseModel, ConfigDict

from lesft_client.planning.options import (
    Conditions,
    Option,
    best_option,
    option,
    recommended,
)

_COLUMNS = (
    *("cut", "memory MiB", "device s", "up s", "server s", "down s", "step s", "MB a step"),
    *("bottleneck", "activations", "gradients", "adapters", ""),
)


class Plan(BaseModel):
    """What was measured, and what follows from it."""

    model_config = ConfigDict(frozen=True)

    lesft_version: str
    server: str
    spec_fingerprint: str
    conditions: Conditions
    options: tuple[Option, ...]
    """Each cut with the encodings that it needs."""
    present: Option
    """The run as it is now."""
    recommended: Option | None
    explanation: tuple[str, ...]
    """Sentences, for people."""


def make_plan(server: str, conditions: Conditions) -> Plan:
    """Judge all cuts."""
    spec = conditions.spec
    options = tuple(
        best_option(conditions, cut_layer) for cut_layer in range(1, conditions.num_layers)
    )
    present = option(
        conditions,
        spec.cut_layer,
        spec.activation_encoding,
        spec.gradient_encoding,
        spec.adapter_encoding,
    )
    best = recommended(options)
    return Plan(
        lesft_version=version("lesft"),
        server=server,
        spec_fingerprint=spec.fingerprint(),
        conditions=conditions,
        options=options,
        present=present,
        recommended=best,
        explanation=(*_verdict(options, present, best, conditions), *_basis(conditions)),
    )


# ---------------------------------------------------------------------- words


def _verdict(
    options: Sequence[Option], present: Option, best: Option | None, conditions: Conditions
) -> list[str]:
    now = (
        f"The run as it is, {_settings(present)}: {_figures(present)}."
        + f" It needs more than the {conditions.memory_mib:.0f} MiB that there are here."
        * (not present.fits)
    )
    if best is None:
        least = min(
            (option for option in options if option.is_deep_enough),
            key=lambda option: option.memory_mib,
        )
        return [
            now,
            f"No cut of at least {conditions.shallowest_cut} layers fits into "
            f"{conditions.memory_mib:.0f} MiB, the smallest needs {least.memory_mib:.0f}: try "
            "--precision int8, --gradient-checkpointing or a smaller --in-flight, or see what "
            "--allow-shallower gives up (docs/planning.md).",
        ]
    if best == present:
        return [now, f"It is what is recommended. {_reason(best, conditions)}"]
    return [
        now,
        f"Recommended is {_settings(best)}: {_figures(best)}. {_reason(best, conditions)}",
        f"For the server: lesft-server ... {server_options(best)}",
    ]


def _settings(option: Option) -> str:
    return (
        f"cut layer {option.cut_layer} with activations as {option.activation_encoding}, "
        f"gradients as {option.gradient_encoding} and adapters as {option.adapter_encoding}"
    )


def _figures(option: Option) -> str:
    return (
        f"{option.step_seconds:.2f} s and {option.mb_up + option.mb_down:.2f} MB a step, "
        f"{option.memory_mib:.0f} MiB; the {option.bottleneck} is the bottleneck"
    )


def _reason(best: Option, conditions: Conditions) -> str:
    quickest = "It has the shortest step (or nearly) of the cuts that fit into memory"
    if conditions.shallowest_cut > 1:
        quickest += f" and keep at least {conditions.shallowest_cut} layers here"
    lean = [
        f"{what} go as {encoding} because the link would be the bottleneck with less lean ones"
        for what, encoding in (
            ("activations", best.activation_encoding),
            ("gradients", best.gradient_encoding),
        )
        if encoding != "raw"
    ]
    if conditions.spec.aggregates and best.adapter_encoding != "raw":
        lean.append(f"adapters go as {best.adapter_encoding} because that shortens a step")
    return "; ".join([quickest, *lean]) + "."


def server_options(option: Option) -> str:
    """What to start the server with, beside its other options."""
    return (
        f"--cut-layer {option.cut_layer} --activation-encoding {option.activation_encoding} "
        f"--gradient-encoding {option.gradient_encoding} "
        f"--adapter-encoding {option.adapter_encoding}"
    )


def _basis(conditions: Conditions) -> list[str]:
    """What was measured and what was computed."""
    link, device, spec = conditions.link, conditions.device, conditions.spec
    measured = (
        f"Measured: the link, {1000 * link.round_trip_seconds:.1f} ms there and back, "
        f"{link.up_bytes_per_second * 8e-6:.1f} Mbit/s up, "
        f"{link.down_bytes_per_second * 8e-6:.1f} down; this device, {device.micro_batches} "
        "micro-batches of the data through each of two fronts"
    )
    others = (
        f", as one that all {spec.clients} clients bring their micro-batches to"
        if spec.clients > 1
        else ""
    )
    if conditions.back is not None:
        measured += f"; the server's own back{others}"
    computed = (
        "Computed from that: all else, as if layers were alike, the aggregator as far as the "
        "server, and every other client as quick as this one"
    )
    if conditions.back is None:
        computed += "; the server could not measure itself and counts as never in the way"
    shown = (
        "Each cut is shown with the least lean encodings with which micro-batches do not wait for "
        "the link most, or the leanest"
    )
    return [f"{measured}.", f"{computed}.", f"{shown}."]


# ---------------------------------------------------------------------- tables


def terminal(plan: Plan) -> str:
    """The table, aligned, and the sentences."""
    rows = [_COLUMNS, *_rows(plan)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if index < 8 else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", *plan.explanation])


def page(plan: Plan) -> str:
    """plan.md."""
    spec = plan.conditions.spec
    lines = ["|".join(("", *row, "")) for row in (_COLUMNS, ("---",) * len(_COLUMNS), *_rows(plan))]
    sentences = [line for sentence in plan.explanation for line in (sentence, "")]
    return "\n".join(
        [
            f"# Where to cut {spec.model_name}",
            "",
            *sentences,
            "![Step time and memory by cut](plan.png)",
            "",
            f"A step is one round of {spec.accumulation} micro-batches and an optimizer step. "
            "Seconds in which device, link and server are busy with it overlap.",
            "",
            *lines,
            "",
        ]
    )


def _rows(plan: Plan) -> list[tuple[str, ...]]:
    return [
        (
            str(option.cut_layer),
            f"{option.memory_mib:.0f}",
            *(
                f"{seconds:.2f}"
                for seconds in (
                    option.device_seconds,
                    option.up_seconds,
                    option.server_seconds,
                    option.down_seconds,
                    option.step_seconds,
                )
            ),
            f"{option.mb_up + option.mb_down:.2f}",
            option.bottleneck,
            option.activation_encoding,
            option.gradient_encoding,
            option.adapter_encoding,
            ", ".join(_notes(plan, option)),
        )
        for option in plan.options
    ]


def _notes(plan: Plan, option: Option) -> list[str]:
    best = plan.recommended
    notes = {
        "recommended": best is not None and option.cut_layer == best.cut_layer,
        "the run's": option.cut_layer == plan.present.cut_layer,
        "does not fit": not option.fits,
        "shallow": not option.is_deep_enough,
    }
    return [note for note, holds in notes.items() if holds]
