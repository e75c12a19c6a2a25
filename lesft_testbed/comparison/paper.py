"""What the paper reports (METHOD section 6), to stand beside our figures: one table.

Its tables and pictures are lost; these are the figures that its text names.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lesft_testbed.comparison.plan import FEW_SHOT
from lesft_testbed.comparison.presets import PAPER_MODELS

_SMALL, _MIDDLE, _LARGE = PAPER_MODELS


@dataclass(frozen=True)
class PaperFigure:
    """One accuracy, in percent, and what it is the accuracy of."""

    presets: tuple[str, ...]
    """Those whose table or figure it belongs to."""
    method: str
    percent: str
    model: str = _LARGE
    data: str = "gsm8k"
    samples: int | None = None
    """Samples per client, where the figure is about them."""
    clients: int | None = None
    cut: str | None = None

    def what(self) -> str:
        """A sentence's part for a table."""
        about = [self.method, self.model.partition("/")[2], self.data]
        about += [f"{self.samples} samples a client"] if self.samples else []
        about += [f"{self.clients} clients"] if self.clients else []
        about += [f"cut {self.cut}"] if self.cut else []
        return ", ".join(about)


def _three(figure: PaperFigure, *percents: str) -> Iterator[PaperFigure]:
    for model, percent in zip(PAPER_MODELS, percents, strict=True):
        yield replace(figure, model=model, percent=percent)


_EVERYWHERE = ("table1", "table3", "fig3", "fig4", "fig5", "fig6", "fig7")
_MAIN = ("table1", "table3", "fig6", "fig7")

PAPER_FIGURES: tuple[PaperFigure, ...] = (
    *_three(PaperFigure(_MAIN, "lesft", ""), "40.94", "61.49", "76.04"),
    PaperFigure(("table1",), "lesft", "78.13", data="commonsense_qa"),
    PaperFigure(("table1",), "lesft", "71.26", data="aqua_rat"),
    PaperFigure(("table1",), "splitfrozen", "56.56"),
    PaperFigure(("table1",), "fedavg", "55.88"),
    PaperFigure(("fig4",), "lesft", "71.19", samples=10),
    PaperFigure(("fig4",), "splitlora", "63.61", samples=10),
    PaperFigure(("fig4",), "fedavg", "64.90", samples=10),
    PaperFigure(("fig4",), "splitfrozen", "63.88", samples=10),
    PaperFigure(("fig4",), "centralized", "56.10", samples=10),
    PaperFigure(("fig7",), "base-only", "60.16"),
    PaperFigure(("fig7",), "reference-only", "68.46"),
    *_three(PaperFigure(("table3",), "uniform-0", ""), "32.07", "45.64", "51.86"),
    PaperFigure(("fig3",), "lesft", "75.59 to 76.65 over the cuts 1/2 to 1/5"),
    PaperFigure(("fig5",), "lesft", "76.36", clients=5),
    *_three(PaperFigure(_EVERYWHERE, FEW_SHOT, ""), "41.6", "68.5", "79.1"),
)
"""The last three are not the paper's but Qwen's own, 4-shot, of the untuned base models."""


def figures_for(preset: str, methods: tuple[str, ...]) -> list[PaperFigure]:
    """Those of a preset's methods; none without a preset."""
    return [
        figure for figure in PAPER_FIGURES if figure.method in methods and preset in figure.presets
    ]
