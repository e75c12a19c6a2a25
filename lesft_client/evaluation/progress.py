"""What is shown while the model answers."""

from lesft_client.counted_progress import CountedProgress
from lesft_client.evaluation.predictions import Prediction


class EvaluationProgress(CountedProgress):
    """The state of an evaluation, on standard error."""

    def __init__(self, total: int, done: int, right: int, bar: bool) -> None:
        """`done` and `right` count what an earlier run did."""
        super().__init__("evaluating", total, done, bar)
        self._right = right
        self._tokens = 0

    def __enter__(self) -> "EvaluationProgress":
        if self._done:
            self.say(f"going on: {self._done} of {self._total} questions are answered")
        return super().__enter__()

    def advance(self, prediction: Prediction) -> None:
        """One more question is answered."""
        self._right += prediction.right
        self._tokens += prediction.tokens
        self.count()
        self.say_line_when_due()

    def figures(self, seconds: float) -> str:
        speed = f"  {self._tokens / seconds:.1f} tokens/s" if self._tokens else ""
        return f"{100 * self._right / self._done:.1f}% right{speed}"
