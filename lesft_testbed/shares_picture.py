"""shares.png: how many samples of which kind each client has."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lesft_testbed.report import Report

_OTHERS = "others"
_PLAIN, _GREY = "#1f5fa8", "#dddddd"
_COLOURS = (
    *("#332288", "#88ccee", "#44aa99", "#117733", "#999933"),
    *("#ddcc77", "#cc6677", "#882255", "#aa4499"),
)
"""Paul Tol's muted scheme, which the colour-blind can tell apart."""

_FILLS = [(colour, hatch) for hatch in ("", "////") for colour in _COLOURS]
"""Of the kinds, by name; the rarest of more kinds are one."""


_Kind = tuple[str | None, list[int], tuple[str, str]]
"""Label, samples of each client, and its bars' colour and hatch."""


def draw_shares(report: Report, path: Path) -> None:
    """A bar for each client, stacked by kind of sample where the data has kinds."""
    kinds = _kinds(report.labels_by_client)
    figure = Figure(
        figsize=(8, max(2.6, 1.4 + 0.5 * report.clients, 0.6 + 0.17 * len(kinds))),
        layout="constrained",
    )
    axes = figure.add_subplot()
    names = [f"client-{index}" for index in range(report.clients)]
    left = [0] * report.clients
    for label, counts, (colour, hatch) in kinds or [(None, report.samples_by_client, (_PLAIN, ""))]:
        axes.barh(
            names,
            counts,
            left=left,
            label=label,
            edgecolor="white",
            linewidth=0.5,
            color=colour,
            hatch=hatch,
        )
        left = [before + count for before, count in zip(left, counts, strict=True)]
    for index, total in enumerate(left):
        axes.annotate(
            str(total), (total, index), xytext=(4, 0), textcoords="offset points", va="center"
        )
    skew, alpha = report.settings["skew"], report.settings["skew_alpha"]
    axes.set_title(f"Shares that differ by {skew}: Dirichlet, alpha {alpha:g}", fontsize=11)
    axes.set_xlabel("samples")
    axes.margins(x=0.08)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    if kinds:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _kinds(labels_by_client: Sequence[dict[str, int]]) -> list[_Kind]:
    """Every kind; the rarest last, as one, where there are more than ways to fill a bar."""
    totals = sum((Counter(labels) for labels in labels_by_client), Counter[str]())
    shown = sorted((label for label, _ in totals.most_common(len(_FILLS))), key=_natural)
    kinds: list[_Kind] = [
        (label, [labels.get(label, 0) for labels in labels_by_client], fill)
        for label, fill in zip(shown, _FILLS, strict=False)
    ]
    if len(shown) < len(totals):
        rest = [
            sum(count for label, count in labels.items() if label not in shown)
            for labels in labels_by_client
        ]
        kinds.append((_OTHERS, rest, (_GREY, "")))
    return kinds


def _natural(label: str) -> tuple[int, str]:
    """2 before 10."""
    return int(label) if label.isdecimal() else -1, label
