"""`lesft-client data`: a data source's samples as JSONL, in the form that --data reads again."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lesft_client.data import Sample, Split, client_share, jsonl, load_samples, skewed_share
from lesft_client.settings import DataSettings, ExportDataSettings


def samples_of(settings: DataSettings, split: Split) -> list[Sample]:
    """The samples of this client's share of a split, as the settings ask for them.

    Only the training split is skewed: all clients are measured by the same kind of samples.
    """
    number, of = settings.share_parts
    wanted = settings.samples if split == "train" else settings.held_out
    count = wanted * of if wanted else None
    samples = load_samples(settings.data, split, count, settings.data_seed)
    if split == "train" and settings.skew != "none":
        return skewed_share(
            samples, number - 1, of, settings.skew, settings.skew_alpha, settings.data_seed
        )
    return client_share(samples, number - 1, of, wanted or None, settings.data_seed)


def export_data(settings: ExportDataSettings) -> None:
    """Write one JSON object per sample, in UTF-8 whatever the locale."""
    data = "".join(map(jsonl.line, samples_of(settings, settings.split))).encode()
    if settings.output is None:
        with _ended_by_broken_pipe():
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
    else:
        settings.output.write_bytes(data)


@contextmanager
def _ended_by_broken_pipe() -> Iterator[None]:
    """For `| head`, which is no error. Not for longer: any closed socket would end the process."""
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGPIPE, before)
