"""`lesft-server status`: the run and its clients on a terminal."""

from typing import Any

from lesft.identity.status_command import connect, show, table
from lesft_server.command_settings import StatusSettings


def status(settings: StatusSettings) -> None:
    """Print where the run stands. Raises LesftError when the server cannot be asked."""
    server = connect(settings)
    run = server.get("/v1/run")
    facts = {
        "run": run,
        "clients": server.get("/v1/clients"),
        "rounds": server.get(f"/v1/rounds?first={max(run['rounds_done'] - 1, 0)}"),
    }
    show(settings, server, facts, _text)


def _text(facts: dict[str, Any]) -> str:
    run = facts["run"]
    lines = [
        f"run        {run['spec']['run_id']}, {run['state']}{', paused' if run['paused'] else ''}",
        f"rounds     {run['rounds_done']} of {run['spec']['rounds']}",
    ]
    if facts["rounds"]:
        newest = facts["rounds"][-1]
        lines.append(f"loss       {newest['loss']:.4f}   -log P per token {newest['nll']:.4f}")
    if run["reason"]:
        lines.append(f"ended      {run['reason']}")
    if run["waiting_for"]:
        lines.append(f"waits for  {run['waiting_for']}")
    head = ("client", "state", "samples", "share", "next round")
    rows = [
        (
            client["client_id"],
            "connected" if client["connected"] else f"away: {client['away_because']}",
            client["num_samples"],
            f"{client['share']:.0%}",
            client["next_round"],
        )
        for client in facts["clients"]
    ]
    return "\n".join([*lines, "", table([head, *rows])]) if rows else "\n".join(lines)
