"""Three organisations on one machine: `sudo python -m tests.organisations`.

Server, aggregator and device each have a network namespace, an address and folders of their own.
The device enrols with both, trains while its certificates renew, and finishes; everything that
crosses between them is captured, and must hold neither text nor frames in the clear. Needs Linux,
root, and the commands `ip` and `tcpdump`.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.processes.harness import make_samples, save_model_with_tokenizer, write_samples

ADDRESSES = {"server": "10.77.0.1", "aggregator": "10.77.0.2", "device": "10.77.0.3"}
SWITCH, BRIDGE = "switch", "br0"
ROUNDS, CERTIFICATE_SECONDS = 60, 45
PATIENCE_SECONDS = 180
CANARY = "pelargonium"
"""A word of the data, in prompts and targets, that nothing else says."""

IN_THE_CLEAR = [b"PRI * HTTP/2.0", b"lora_A", b"lesft.v1", b"/v1/", b"HTTP/1.1", b"client_id"]
BIN = Path(sys.executable).parent


def main() -> int:
    """Run it; returns the exit status."""
    if os.geteuid() != 0:
        print("needs root, for network namespaces: sudo python -m tests.organisations")
        return 2
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        stack.enter_context(networks())
        capture = folder / "wire.pcap"
        stack.enter_context(captured(capture))
        facts = run(folder, stack)
        stack.close()
        return report(facts, capture)


# ---------------------------------------------------------------------- the machines


def sh(*command: str) -> str:
    """What a command prints; its complaint ends the test."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@contextlib.contextmanager
def networks() -> Iterator[None]:
    """A namespace for each organisation, and one with the switch between them.

    There the firewall of this machine, as a container engine sets it up, has no say.
    """
    names = [SWITCH, *ADDRESSES]
    try:
        for name in names:
            sh("ip", "netns", "add", f"lesft-{name}")
        within(SWITCH, "ip", "link", "add", BRIDGE, "type", "bridge")
        within(SWITCH, "ip", "link", "set", BRIDGE, "up")
        for index, (name, address) in enumerate(ADDRESSES.items()):
            port = f"port{index}"
            far_end = ("peer", "name", "eth0", "netns", f"lesft-{name}")
            within(SWITCH, "ip", "link", "add", port, "type", "veth", *far_end)
            within(SWITCH, "ip", "link", "set", port, "master", BRIDGE, "up")
            within(name, "ip", "address", "add", f"{address}/24", "dev", "eth0")
            within(name, "ip", "link", "set", "eth0", "up")
            within(name, "ip", "link", "set", "lo", "up")
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", f"lesft-{name}"], check=False)


def command_within(name: str, *command: str) -> list[str]:
    return ["ip", "netns", "exec", f"lesft-{name}", *command]


def within(name: str, *command: str) -> str:
    """Run a command on one organisation's machine."""
    return sh(*command_within(name, *command))


@contextlib.contextmanager
def captured(file: Path) -> Iterator[None]:
    """Everything that crosses the bridge, whole packets."""
    command = [
        *command_within(SWITCH),
        "tcpdump",
        "-i",
        BRIDGE,
        "-w",
        str(file),
        "-s",
        "0",
        "-U",
        "--immediate-mode",
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as capture:
        time.sleep(1)
        try:
            yield
        finally:
            time.sleep(1)
            capture.terminate()


@contextlib.contextmanager
def service(name: str, log: Path, *command: str) -> Iterator[None]:
    """A process on one organisation's machine."""
    with log.open("w") as output:
        started = subprocess.Popen(
            command_within(name, *command), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield
    finally:
        started.terminate()
        started.wait(30)


# ---------------------------------------------------------------------- the run


def run(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Enrol, train, finish; returns what is to be reported."""
    homes = {name: folder / name for name in ADDRESSES}
    for home in homes.values():
        home.mkdir()
    save_model_with_tokenizer(homes["server"] / "model")
    save_model_with_tokenizer(homes["device"] / "tokenizer")
    for weights in (homes["device"] / "tokenizer").glob("*.safetensors"):
        weights.unlink()
    samples = [
        {name: f"{CANARY} {text}" for name, text in sample.items()} for sample in make_samples(12)
    ]
    data = write_samples(homes["device"] / "data.jsonl", samples)

    hours = str(CERTIFICATE_SECONDS / 3600)
    states = {name: homes[name] / "state" for name in ("server", "aggregator")}
    common = {
        name: [
            f"--listen={ADDRESSES[name]}:{port}",
            f"--control={ADDRESSES[name]}:{port - 42000}",
            f"--certificate-hours={hours}",
            "--clients=1",
        ]
        for name, port in (("server", 50051), ("aggregator", 50052))
    }
    own = [f"--model={homes['server'] / 'model'}", f"--rounds={ROUNDS}", "--cut-layer=1"]
    start(stack, homes, "server", states["server"], *common["server"], *own)
    key = sh(str(BIN / "lesft-server"), "key", f"--state={states['server']}").strip()
    start(
        stack,
        homes,
        "aggregator",
        states["aggregator"],
        *common["aggregator"],
        f"--server-key={key}",
    )

    identity = f"--identity={homes['device'] / 'identity'}"
    for name, state in states.items():
        token = sh(str(BIN / f"lesft-{name}"), "enroll", "ward-3", f"--state={state}").strip()
        within("device", str(BIN / "lesft-client"), "enroll", token, identity)

    began = time.monotonic()
    training = subprocess.Popen(
        command_within(
            "device",
            *(str(BIN / "lesft-client"), "train", identity, "--threads=1", "--progress=lines"),
            f"--server={ADDRESSES['server']}:50051",
            f"--aggregator={ADDRESSES['aggregator']}:50052",
            f"--model={homes['device'] / 'tokenizer'}",
            f"--cache={homes['device'] / 'cache'}",
            f"--data={data}",
            f"--state={homes['device'] / 'state'}",
        ),
        stdout=(homes["device"] / "log").open("w"),
        stderr=subprocess.STDOUT,
    )
    # A certificate ends and two more are made meanwhile.
    server = [str(BIN / "lesft-server"), "token", "anna", "--role=operator"]
    token = sh(*server, f"--state={states['server']}").strip()
    wait_until_round(token, states["server"], 5, homes["device"] / "log")
    order(token, states["server"], "pause")
    time.sleep(1.5 * CERTIFICATE_SECONDS)
    order(token, states["server"], "resume")
    if training.wait(PATIENCE_SECONDS) != 0:
        raise SystemExit((homes["device"] / "log").read_text())
    result = json.loads((homes["device"] / "state" / "result.json").read_text())
    return {
        "seconds": time.monotonic() - began,
        "rounds": result["round"],
        "loss": result["loss_by_round"],
        "reconnects": result["reconnects"],
        "renewals": len(re.findall("was renewed", (homes["device"] / "log").read_text())),
        "version": result["adapter_version"],
        "token_ids": token_ids(homes["device"] / "tokenizer", samples),
    }


def start(
    stack: contextlib.ExitStack, homes: dict[str, Path], name: str, state: Path, *options: str
) -> None:
    """One of the two services, until it listens."""
    log = homes[name] / "log"
    stack.enter_context(
        service(name, log, str(BIN / f"lesft-{name}"), f"--state={state}", *options)
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (state / "endpoints.json").exists():
        if time.monotonic() > deadline:
            raise SystemExit(f"{name} does not start:\n{log.read_text()}")
        time.sleep(0.2)


def curl(token: str, state: Path, method: str, path: str) -> Any:
    """An operator on the device's network looks at the server, by name, address and fingerprint."""
    code = (
        "import sys, json; from lesft.identity.https import ControlClient; "
        "a, c, t, m, p = sys.argv[1:]; "
        "client = ControlClient(a, open(c, 'rb').read(), 'lesft-server', t); "
        "print(json.dumps(client.get(p) if m == 'GET' else client.post(p, None)))"
    )
    address = f"{ADDRESSES['server']}:8051"
    authority = str(state / "identity" / "authority.pem")
    python = (sys.executable, "-c", code, address, authority, token, method, path)
    return json.loads(within("device", *python))


def order(token: str, state: Path, name: str) -> None:
    curl(token, state, "POST", f"/v1/{name}")


def wait_until_round(token: str, state: Path, count: int, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while curl(token, state, "GET", "/v1/run")["rounds_done"] < count:
        if time.monotonic() > deadline:
            raise SystemExit(f"training does not begin:\n{log.read_text()}")
        time.sleep(0.1)


def token_ids(tokenizer: Path, samples: Sequence[dict[str, str]]) -> bytes:
    """A target's token ids as they would lie in a bundle."""
    import numpy as np
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tokenizer)(samples[0]["target"])["input_ids"]
    return np.array(ids, dtype="<i4").tobytes()


# ---------------------------------------------------------------------- what came of it


def report(facts: dict[str, Any], capture: Path) -> int:
    """Print the figures; 1 when anything is not as it must be."""
    wire = capture.read_bytes()
    forbidden = [CANARY.encode(), facts["token_ids"], *IN_THE_CLEAR]
    found = [needle for needle in forbidden if needle in wire]
    checks = {
        "all rounds are done": facts["rounds"] == ROUNDS,
        "certificates were renewed in mid-run": facts["renewals"] >= 2,
        "connections were made again with them": facts["reconnects"] >= 1,
        "the aggregator took every receipt": facts["version"] >= 1,
        "the capture holds the run": len(wire) > 500_000,
        "nothing of it is in the clear": not found,
    }
    print(f"{ROUNDS} rounds in {facts['seconds']:.0f} s, version {facts['version']}")
    print(f"loss {facts['loss'][0]:.4f} -> {facts['loss'][-1]:.4f}")
    print(f"{facts['renewals']} renewals, {facts['reconnects']} reconnections")
    print(f"{len(wire)} bytes captured, looked through for {len(forbidden)} strings: {found}")
    for what, holds in checks.items():
        print(f"{'ok ' if holds else 'NOT'} {what}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
