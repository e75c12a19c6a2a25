"""`lesft-client data`: a data source's samples as JSONL, in the form that --data reads again."""

import json
import sys
from dataclasses import asdict

from lesft_client.data import Sample, Split, client_share, load_samples
from lesft_client.settings import DataSettings, ExportDataSettings


def samples_of(settings: DataSettings, split: Split) -> list[Sample]:
    """The samples of this client's share of a split, as the settings ask for them."""
    index, of = map(int, settings.share.split("/"))
    wanted = settings.samples if split == "train" else settings.held_out
    count = wanted * of if wanted else None
    samples = load_samples(settings.data, split, count, settings.data_seed)
    return client_share(samples, index - 1, of, wanted or None, settings.data_seed)


def export_data(settings: ExportDataSettings) -> None:
    """Write one JSON object per sample."""
    lines = [
        json.dumps(asdict(sample), ensure_ascii=False) + "\n"
        for sample in samples_of(settings, settings.split)
    ]
    if settings.output is None:
        sys.stdout.writelines(lines)
    else:
        settings.output.write_text("".join(lines))
