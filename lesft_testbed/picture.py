"""loss.png: what the loss did, round by round."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lesft_testbed.report import Report

_LOSS, _NLL, _CLIENT = "#1f5fa8", "#c2571a", "#9db7d5"


def draw_loss(report: Report, loss_by_client: Sequence[Sequence[float]], path: Path) -> None:
    """Loss and -log P by round, each client's own loss, held-out likelihood before and after."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    rounds = range(1, report.rounds + 1)
    if len(loss_by_client) > 1:
        for index, losses in enumerate(loss_by_client):
            label = "loss of each client" if index == 0 else None
            axes.plot(rounds, losses, color=_CLIENT, linewidth=0.8, label=label)
    nll_name = "$-$log P per target token"
    if report.loss_by_round == report.nll_by_round:
        nll_name = f"loss: {nll_name}"
    else:
        axes.plot(rounds, report.loss_by_round, color=_LOSS, linewidth=2, label=_loss_name(report))
    axes.plot(rounds, report.nll_by_round, color=_NLL, linewidth=2, label=nll_name)
    if report.heldout_nll_before is not None and report.heldout_nll_after is not None:
        held_out = [report.heldout_nll_before, report.heldout_nll_after]
        axes.plot(
            [0, report.rounds],
            held_out,
            color=_NLL,
            linestyle="none",
            marker="D",
            markersize=7,
            clip_on=False,
            label="held-out $-$log P, before and after",
        )
        for x, value in ((0, held_out[0]), (report.rounds, held_out[1])):
            axes.annotate(
                f"{value:.3f}", (x, value), xytext=(0, -16), textcoords="offset points", ha="center"
            )
    clients = "1 client" if report.clients == 1 else f"{report.clients} clients"
    cut = "not split" if report.cut_layer is None else f"cut after layer {report.cut_layer}"
    method = "" if report.method == "lesft" else f", {report.method}"
    axes.set_title(
        f"{report.model} on {Path(report.dataset).name}: {clients}, {cut}{method}", fontsize=11
    )
    axes.set_xlabel("round (one optimizer step each)")
    axes.set_ylabel("nats")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _loss_name(report: Report) -> str:
    is_uniform = report.settings["loss"]["token_weights"] == "uniform"
    return "loss" if is_uniform else "loss (token-weighted)"
