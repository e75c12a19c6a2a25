"""`lesft-aggregator status`: the rounds and their clients on a terminal."""

from typing import Any

from lesft.identity.status_command import connect, show, table
from lesft_aggregator.command_settings import StatusSettings


def status(settings: StatusSettings) -> None:
    """Print where the rounds stand. Raises LesftError when the aggregator cannot be asked."""
    aggregator = connect(settings)
    facts = {
        "run": aggregator.get("/v1/run"),
        "clients": aggregator.get("/v1/clients"),
        "round": aggregator.get("/v1/rounds")[-1],
    }
    show(settings, aggregator, facts, _text)


def _text(facts: dict[str, Any]) -> str:
    run, current = facts["run"], facts["round"]
    lines = [
        f"run        {run['run_id']}, {len(facts['clients'])} of {run['clients']} clients known",
        f"version    {run['version']} is published, {current['version']} is {current['state']}",
    ]
    if run["waiting_for"]:
        lines.append(f"waits for  {run['waiting_for']}")
    if run["ended"]:
        lines.append(f"ended      {run['ended']}")
    head = ("client", "samples", "this round")
    rows = [
        (
            client["client_id"],
            client["num_samples"],
            "submitted" if client["client_id"] in current["client_ids"] else "missing",
        )
        for client in facts["clients"]
    ]
    return "\n".join([*lines, "", table([head, *rows])]) if rows else "\n".join(lines)
