"""The services as processes of this machine: started, watched and always ended."""

import json
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import psutil

from lesft.control import ENDPOINTS_FILE
from lesft.errors import RunStopped

_STOP_SECONDS = 15
_SETTLE_SECONDS = 3
_LOG_LINES = 15

STOPPED_BY_OTHERS = 3
"""Exit status of a client whose run was ended by another party: a consequence, not a cause."""


class Process:
    """One service: its process, its log and its state folder."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, state: Path, append: bool = False
    ) -> None:
        """Starts it. The log begins with the command line, so that it can be run by hand.

        `append` keeps what an earlier life of the service has logged.
        """
        self.name = name
        self.log = log
        self.state = state
        self.peak_rss_bytes = 0
        state.mkdir(parents=True, exist_ok=True)
        with log.open("a" if append else "w") as file:
            print("$", *command, file=file, flush=True)
            # A session of its own: Ctrl-C in the terminal reaches the testbed only, which then
            # ends the services in order.
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._popen.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self._popen.poll()

    def address(self, kind: str) -> str | None:
        """The real address of "grpc" or "control" once the service listens there."""
        return self.endpoint(kind)

    def endpoint(self, name: str) -> str | None:
        """What the service has written in its endpoints.json; see `lesft.control`."""
        try:
            written = json.loads((self.state / ENDPOINTS_FILE).read_text())
        except FileNotFoundError:
            return None
        value: str | None = written.get(name)
        return value

    def measure_memory(self) -> int:
        """Resident memory in bytes now; remembers the peak. 0 when the process has ended."""
        try:
            resident: int = psutil.Process(self.pid).memory_info().rss
            peak = _kernel_peak(self.pid)
        except (psutil.Error, OSError):
            return 0
        self.peak_rss_bytes = max(self.peak_rss_bytes, resident, peak)
        return resident

    def end(self) -> str:
        """How it ended, for a message."""
        status = self.exit_status
        if status is None:
            return "is running"
        if status < 0:
            return f"was ended by signal {signal.Signals(-status).name}"
        return f"ended with status {status}"

    def log_tail(self, lines: int = _LOG_LINES) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def ask_to_stop(self) -> None:
        """SIGTERM, when it still runs."""
        if self.exit_status is None:
            self.measure_memory()
            self._popen.terminate()

    def kill(self) -> None:
        """SIGKILL, as a power cut would end it, and wait until it is gone."""
        self._popen.kill()
        self._popen.wait()

    def wait(self, seconds: float) -> None:
        """Wait for its end, but not longer; then kill it."""
        try:
            self._popen.wait(max(seconds, 0.01))
        except subprocess.TimeoutExpired:
            self.kill()


def _kernel_peak(pid: int) -> int:
    """Linux' own record of a process's largest resident set, in bytes; 0 on other systems."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)


class Processes:
    """All services of one run. As a context manager it ends them all, whatever happens."""

    def __init__(self, output: Path) -> None:
        """Logs go to `output`, state folders to `output`/state."""
        self._output = output
        self.all: dict[str, Process] = {}

    def start(self, name: str, command: Sequence[str], append: bool = False) -> Process:
        """Start one service; `append` goes on in the log of an earlier life."""
        process = Process(name, command, self._output / f"{name}.log", self.state_of(name), append)
        self.all[name] = process
        return process

    def kill(self, name: str) -> None:
        """Kill one service and forget it: its end is no failure, and it may be started again."""
        self.all.pop(name).kill()

    def state_of(self, name: str) -> Path:
        """The state folder of a service."""
        return self._output / "state" / name

    def check(self, may_end: Sequence[str] = ()) -> None:
        """Raises RunStopped, naming the first that failed and the end of its log, when one has.

        Only those in `may_end` may end, and only with status 0.
        """
        failed = self._failed(may_end)
        if failed and all(process.exit_status == STOPPED_BY_OTHERS for process in failed):
            # The one whose fault it was may take a moment longer to end.
            deadline = time.monotonic() + _SETTLE_SECONDS
            while time.monotonic() < deadline and len(failed) == len(self._failed(may_end)):
                time.sleep(0.05)
            failed = self._failed(may_end)
        if failed:
            cause = min(failed, key=lambda process: process.exit_status == STOPPED_BY_OTHERS)
            raise RunStopped(
                f"{cause.name} {cause.end()}; the end of {cause.log}:\n{cause.log_tail()}"
            )

    def _failed(self, may_end: Sequence[str]) -> list[Process]:
        return [
            process
            for process in self.all.values()
            if process.exit_status is not None
            and not (process.exit_status == 0 and process.name in may_end)
        ]

    def stop(self) -> None:
        """End those that still run, the last started first, and wait for them.

        Kills those that are left when their time is over, or at another Ctrl-C.
        """
        processes = list(reversed(self.all.values()))
        deadline = time.monotonic() + _STOP_SECONDS
        try:
            for process in processes:
                process.ask_to_stop()
            for process in processes:
                process.wait(deadline - time.monotonic())
        except KeyboardInterrupt:
            for process in processes:
                process.wait(0)
            raise

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
