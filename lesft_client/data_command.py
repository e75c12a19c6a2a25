"""`lesft-client data`: a data source's samples as JSONL, in the form that --data reads again."""

import json
import signal
import sys
from dataclasses import asdict

from lesft_client.data import Sample, Split, client_share, load_samples
from lesft_client.settings import DataSettings, ExportDataSettings


def samples_of(settings: DataSettings, split: Split) -> list[Sample]:
    """The samples of this client's share of a split, as the settings ask for them."""
    number, of = settings.share_parts
    wanted = settings.samples if split == "train" else settings.held_out
    count = wanted * of if wanted else None
    samples = load_samples(settings.data, split, count, settings.data_seed)
    return client_share(samples, number - 1, of, wanted or None, settings.data_seed)


def export_data(settings: ExportDataSettings) -> None:
    """Write one JSON object per sample, in UTF-8 whatever the locale."""
    lines = [
        json.dumps(asdict(sample), ensure_ascii=False) + "\n"
        for sample in samples_of(settings, settings.split)
    ]
    data = "".join(lines).encode()
    if settings.output is None:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
        sys.stdout.buffer.write(data)
    else:
        settings.output.write_bytes(data)
