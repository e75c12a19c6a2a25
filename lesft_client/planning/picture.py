"""plan.png: what each cut would cost, in time and in memory."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lesft_client.planning.report import Plan

_STAGES = (
    ("device_seconds", "this device", "#0072B2"),
    ("up_seconds", "uplink", "#E69F00"),
    ("server_seconds", "server", "#009E73"),
    ("down_seconds", "downlink", "#CC79A7"),
)
_STEP, _LIMIT, _SHADE = "black", "#D55E00", "#bbbbbb"


def draw_plan(plan: Plan, path: Path) -> None:
    """Seconds of a step by cut, whole and by who is busy; memory by cut below."""
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    time_axes, memory_axes = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    _draw_time(time_axes, plan)
    _draw_memory(memory_axes, plan)
    for axes in (time_axes, memory_axes):
        _mark_cuts(axes, plan)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
    memory_axes.set_xlabel("cut layer (decoder layers on this device)")
    memory_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    time_axes.legend(frameon=False, fontsize=9, ncols=2)
    time_axes.set_title(
        f"{plan.conditions.spec.model_name}, encodings as each cut needs", fontsize=11
    )
    figure.savefig(path, dpi=150)


def _draw_time(axes: Axes, plan: Plan) -> None:
    cuts = [option.cut_layer for option in plan.options]
    for field, label, colour in _STAGES:
        seconds = [getattr(option, field) for option in plan.options]
        axes.plot(cuts, seconds, color=colour, linewidth=1.2, label=f"{label} busy")
    steps = [option.step_seconds for option in plan.options]
    axes.plot(cuts, steps, color=_STEP, linewidth=2.2, label="whole step")
    present, best = plan.present, plan.recommended
    axes.plot(
        present.cut_layer,
        present.step_seconds,
        "D",
        color=_STEP,
        markerfacecolor="white",
        markersize=8,
        label="the run as it is",
    )
    if best is not None:
        axes.plot(
            best.cut_layer,
            best.step_seconds,
            "*",
            color=_STEP,
            markersize=15,
            label="recommended",
        )
    axes.set_ylabel("seconds a step")


def _draw_memory(axes: Axes, plan: Plan) -> None:
    cuts = [option.cut_layer for option in plan.options]
    axes.plot(cuts, [option.memory_mib for option in plan.options], color=_STEP, linewidth=2.2)
    limit = plan.conditions.memory_mib
    if limit and limit < 2 * max(option.memory_mib for option in plan.options):
        axes.axhline(limit, color=_LIMIT, linewidth=1.2)
        axes.annotate(
            "may be used here", (cuts[-1], limit), color=_LIMIT, fontsize=9, ha="right", va="bottom"
        )
    axes.set_ylabel("MiB on this device")


def _mark_cuts(axes: Axes, plan: Plan) -> None:
    """Cuts that are not recommended whatever they cost are shaded."""
    for option in plan.options:
        if not (option.fits and option.is_deep_enough):
            axes.axvspan(
                option.cut_layer - 0.5, option.cut_layer + 0.5, color=_SHADE, alpha=0.25, lw=0
            )
