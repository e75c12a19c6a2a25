"""What is shown while the teacher works: counts, and the service's own complaints."""

from lesft_client.counted_progress import LINE_SECONDS, CountedProgress


class Display(CountedProgress):
    """The state of the run, on standard error."""

    def __init__(self, total: int, done: int, kept: int, bar: bool) -> None:
        """`done` and `kept` count what an earlier run did."""
        super().__init__("asking the teacher", total, done, bar)
        self._kept = kept
        self._requests = 0
        self._waiting_said = -LINE_SECONDS

    def finished(self, kept: bool, requests: int) -> None:
        """One more question is done; `requests` counts all that this process has sent."""
        self._kept += kept
        self._requests = requests
        self.count()

    def waiting(self, reason: str) -> None:
        """Say why requests are sent again, at most every ten seconds."""
        seconds = self.seconds()
        if seconds - self._waiting_said >= LINE_SECONDS:
            self._waiting_said = seconds
            self.say(f"{reason}; trying again")

    def figures(self, seconds: float) -> str:
        return f"{self._kept} kept  {60 * self._requests / seconds:.0f} requests/min"
