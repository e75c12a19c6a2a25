"""Starts services by forking a process that has loaded torch; disturbs them at a given call.

A child is a whole process: its own sockets and files, and SIGKILL ends it as a power cut would. The
protocol is one JSON object a line: start -> {"pid": N}, poll -> {"status": N or null}, and kill.
"""

import errno
import functools
import importlib
import inspect
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any


def disturb(target: str, how: str, which: int | str) -> None:
    """Change what a call of `module:name.of.it` does.

    "before" and "after" end the process at its call number `which`, counted from 1; "slow" puts so
    many milliseconds before each call; "full" lets it fail as on a full disk while the file `which`
    exists.
    """
    module_name, _, path = target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def before() -> bool:
        """Whether the process is to end after this call."""
        nonlocal calls
        calls += 1
        if how == "slow":
            time.sleep(int(which) / 1000)
        if how == "full" and os.path.exists(which):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if how == "before" and calls == which:
            os.kill(os.getpid(), signal.SIGKILL)
        return how == "after" and calls == which

    @functools.wraps(original)
    async def call_async(*arguments: Any, **options: Any) -> Any:
        last = before()
        result = await original(*arguments, **options)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    @functools.wraps(original)
    def call(*arguments: Any, **options: Any) -> Any:
        last = before()
        result = original(*arguments, **options)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, call_async if inspect.iscoroutinefunction(original) else call)


def _child(request: dict[str, Any]) -> int:
    log = os.open(request["log"], os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, target)
    try:
        if request["disturbance"]:
            disturb(*request["disturbance"])
        main = importlib.import_module(request["module"]).main
        main(request["arguments"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Serve requests from standard input until it is closed."""
    import torch

    # Everything that takes long to load. gRPC itself is started by the children.
    for module in ("lesft_server.server", "lesft_client.train", "lesft_aggregator.server"):
        importlib.import_module(module)
    for family in ("llama",):
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    importlib.import_module("peft.tuners.lora")
    torch.set_num_threads(1)
    _say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = {"status": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            pid = os.fork()
            if pid == 0:
                sys.stdout.flush()
                os._exit(_child(request))
            answer = {"pid": pid}
        _say(answer)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
