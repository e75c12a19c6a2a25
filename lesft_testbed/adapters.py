"""What a run leaves to take home: PEFT adapters of the whole model, one or one of each client."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lesft.errors import InternalError
from lesft_testbed.settings import RunSettings

ADAPTER_FOLDER = "adapter"
"""In the output: the adapter, or a folder of each client's."""

_LOCAL_FOLDER = "adapter"
"""In the state folder of a client that held the whole model."""


def gather_adapters(
    settings: RunSettings,
    state_of: Callable[[str], Path],
    clients: Sequence[str],
    results: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Put the adapters together in the output, and return their folders relative to it.

    `settings` as those who trained saw them, `results` the clients' result.json. Raises
    InternalError where clients must end with the same adapter and do not.
    """
    if settings.one_adapter:
        _check_all_equal(results)
        folders = {clients[0]: ADAPTER_FOLDER}
    else:
        folders = {name: f"{ADAPTER_FOLDER}/{name}" for name in clients}
    for name, result in zip(clients, results, strict=True):
        if name not in folders:
            continue
        folder = settings.output / folders[name]
        if settings.split:
            of = results if settings.one_adapter else [result]
            _join_halves(state_of(name), state_of("server"), of, folder)
        else:
            shutil.copytree(state_of(name) / _LOCAL_FOLDER, folder)
    return list(folders.values())


def _check_all_equal(results: Sequence[Mapping[str, Any]]) -> None:
    digests = {result["adapter_sha256"] for result in results}
    if len(digests) != 1:
        raise InternalError(
            f"the clients' adapters differ after the last aggregation: {', '.join(sorted(digests))}"
        )


def _join_halves(
    client: Path, server: Path, results: Sequence[Mapping[str, Any]], folder: Path
) -> None:
    """Front and back, each from a state folder, as one PEFT adapter."""
    # torch takes seconds to load; only here.
    from lesft.adapter_export import export_adapter
    from lesft.adapter_halves import SPEC_FILE, load_half
    from lesft.model_card import figures_of
    from lesft.spec import RunSpec

    spec = RunSpec.model_validate_json((server / SPEC_FILE).read_text())
    folder.parent.mkdir(parents=True, exist_ok=True)
    export_adapter(folder, load_half(client), load_half(server), spec, figures=figures_of(results))
