"""`make test-compose`: images and docker-compose.yml for real, from the build to a finished run.

Four clients fine-tune the default model with server and aggregator, a container each. The result is
checked through the control APIs. Needs a container engine that `docker` reaches. Images stay,
so that a second call is quick; containers, networks and volumes do not.
"""

import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from tests.compose.checks import (
    CLIENTS,
    check_aggregator,
    check_clients,
    check_encryption,
    check_images,
    check_isolation,
    check_server,
    get_json,
    require,
)
from tests.compose.engine import ROOT, Compose, Failed, docker, image_bytes

ROUNDS, AGGREGATION_INTERVAL, SAMPLES, HELD_OUT = 4, 2, 8, 4
PATIENCE_SECONDS = 300
"""How long nothing at all may happen: no round, no container that starts or ends."""

IMAGE_PYTHON = "3.11"
MAX_AGGREGATOR_BYTES = 300_000_000

log = logging.getLogger("test-compose")


def main() -> int:
    """Run the test; returns the exit status."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    start = time.monotonic()
    try:
        docker("info")
        model_dir = prepare_model()
        prepare_wheels()
        build_and_run(model_dir)
    except Failed as error:
        log.error("FAILED: %s", error)
        return 1
    log.info("test-compose passed in %.0f s", time.monotonic() - start)
    return 0


@contextmanager
def timed(step: str) -> Iterator[None]:
    """Say what begins, and how long it took."""
    log.info("%s ...", step)
    start = time.monotonic()
    yield
    log.info("%s: %.0f s", step, time.monotonic() - start)


def prepare_model() -> Path:
    """LESFT_MODEL_DIR, or the project's default model."""
    if given := os.environ.get("LESFT_MODEL_DIR"):
        return Path(given).resolve()
    command = [str(Path(sys.executable).with_name("lesft-testbed")), "model"]
    with timed("preparing the model"):
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    require(done.returncode == 0, f"{' '.join(command)} ended with status {done.returncode}")
    return Path(done.stdout.splitlines()[-1])


def prepare_wheels() -> None:
    """Give the images the CPU build of torch where this machine's pip has found one.

    Such a machine has an index or a wheel of its own that the build would not see; it would fetch
    the much larger CUDA build instead.
    """
    torch = f"torch=={version('torch')}"
    wheels = ROOT / "docker" / "wheels"
    if not torch.endswith("+cpu") or list(wheels.glob("torch-*+cpu-*.whl")):
        return
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-cache-dir", "--no-deps"]
    command += ["--only-binary", ":all:", "--python-version", IMAGE_PYTHON, "--dest", str(wheels)]
    with timed(f"fetching {torch} for the images"):
        subprocess.run([*command, torch], cwd=ROOT, check=True)


def build_and_run(model_dir: Path) -> None:
    """Build, run to the end, check, and tear down whatever happens."""
    compose = Compose(
        {
            "LESFT_MODEL_DIR": str(model_dir),
            "LESFT_SERVER_ROUNDS": str(ROUNDS),
            "LESFT_SERVER_AGGREGATION_INTERVAL": str(AGGREGATION_INTERVAL),
            "LESFT_CLIENT_SAMPLES": str(SAMPLES),
            "LESFT_CLIENT_HELD_OUT": str(HELD_OUT),
            # Any free port: the usual ones may be taken.
            "LESFT_SERVER_CONTROL_PORT": "0",
            "LESFT_AGGREGATOR_CONTROL_PORT": "0",
        }
    )
    try:
        compose("down", "--volumes")
        with timed("building the images"):
            compose("build")
        report_sizes()
        check_images()
        with timed("starting the containers in order of health"):
            compose("up", "--detach", "--no-build")
        check_isolation(compose.containers())
        check_encryption(compose)
        with timed(f"training {ROUNDS} rounds"):
            wait_for_clients(compose)
        check_result(compose, model_dir)
    except BaseException:
        show_logs(compose)
        raise
    finally:
        with timed("tearing down"):
            compose("down", "--volumes")


def report_sizes() -> None:
    """Print the images' sizes. Raises Failed when the aggregator's is too large."""
    for image in ("lesft-server", "lesft-client", "lesft-aggregator"):
        size = image_bytes(image)
        log.info("image %s: %.0f MB", image, size / 1e6)
    require(size < MAX_AGGREGATOR_BYTES, f"the aggregator's image has {size} bytes")


def wait_for_clients(compose: Compose) -> None:
    """Wait until all clients have ended well. Raises Failed when one did not, or nothing moves."""
    before, moved_at = "", time.monotonic()
    while True:
        containers = compose.containers()
        failed = [container for container in containers.values() if container.failed]
        require(not failed, f"{', '.join(each.service for each in failed)} ended with an error")
        require(containers["server"].status == "running", "the server has stopped")
        require(containers["aggregator"].status == "running", "the aggregator has stopped")
        ended = sum(containers[name].status == "exited" for name in CLIENTS)
        run = get_json(compose, "server", "/v1/run")
        now = f"run {run['state']}, {run['rounds_done']} rounds done, {ended} clients have ended"
        if now != before:
            log.info("%s", now)
            before, moved_at = now, time.monotonic()
        if ended == len(CLIENTS):
            return
        waited = time.monotonic() - moved_at
        require(waited < PATIENCE_SECONDS, f"nothing has happened for {waited:.0f} s")
        time.sleep(2)


def check_result(compose: Compose, model_dir: Path) -> None:
    """Check the finished run and print its figures."""
    losses = check_server(compose, ROUNDS, SAMPLES)
    log.info("loss by round: %s", ", ".join(f"{loss:.4f}" for loss in losses))
    versions = math.ceil(ROUNDS / AGGREGATION_INTERVAL)
    digest = check_aggregator(compose, versions)
    with tempfile.TemporaryDirectory() as scratch:
        before, after = check_clients(compose, digest, model_dir, Path(scratch))
    log.info("version %d, sha256 %s, is what all four clients hold", versions, digest)
    log.info("held-out -log P per token: %.4f before, %.4f after", before, after)
    for service in ("server", "aggregator"):
        health = compose.containers()[service].health
        require(health == "healthy", f"{service} is {health}")


def show_logs(compose: Compose) -> None:
    """The logs, the one of the container that failed first before the others."""
    try:
        containers = compose.containers().values()
        for each in sorted(containers, key=lambda each: (not each.failed, each.finished_at)):
            lines = 60 if each.failed else 15
            status = f"{each.status}, exit status {each.exit_code}, health {each.health or 'none'}"
            log.info("--- %s (%s)\n%s", each.service, status, compose.logs(each.service, lines))
    except Failed as error:
        log.info("no logs: %s", error)


if __name__ == "__main__":
    sys.exit(main())
