"""What is shown while the model answers."""

from collections.abc import Iterable

from lesft_client.counted_progress import CountedProgress
from lesft_client.evaluation.predictions import Prediction


class EvaluationProgress(CountedProgress):
    """The state of an evaluation, on standard error."""

    def __init__(self, total: int, earlier: Iterable[Prediction], bar: bool) -> None:
        """`earlier` are an earlier run's predictions."""
        kept = list(earlier)
        super().__init__("evaluating", total, len(kept), bar)
        self._asked = self._right = self._nll_tokens = 0
        self._nll = 0.0
        for prediction in kept:
            self._take(prediction)
        self._tokens = 0

    def __enter__(self) -> "EvaluationProgress":
        if self._done:
            self.say(f"going on: {self._done} of {self._total} questions are answered")
        return super().__enter__()

    def advance(self, prediction: Prediction) -> None:
        """One more question is answered."""
        self._take(prediction)
        self._tokens += prediction.tokens
        self.count()
        self.say_line_when_due()

    def figures(self, seconds: float) -> str:
        figures = []
        if self._asked:
            figures.append(f"{100 * self._right / self._asked:.1f}% right")
        if self._nll_tokens:
            figures.append(f"-log P per token {self._nll / self._nll_tokens:.4f}")
        if self._tokens:
            figures.append(f"{self._tokens / seconds:.1f} tokens/s")
        return "  ".join(figures)

    def _take(self, prediction: Prediction) -> None:
        if prediction.right is not None:
            self._asked += 1
            self._right += prediction.right
        if prediction.nll is not None:
            self._nll += prediction.nll
            self._nll_tokens += prediction.nll_tokens
