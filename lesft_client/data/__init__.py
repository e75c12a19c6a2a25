"""The client's data: sources, prompts, shares, order and token ids. Imports no torch."""

from lesft_client.data.answers import final_answer
from lesft_client.data.encode import EncodedSample, encode_prompt, encode_samples, end_token_id
from lesft_client.data.labels import Skew, label_counts
from lesft_client.data.order import sample_index
from lesft_client.data.samples import Sample, Split
from lesft_client.data.shares import client_share
from lesft_client.data.skewed_shares import skewed_share
from lesft_client.data.sources import load_samples

__all__ = [
    "EncodedSample",
    "Sample",
    "Skew",
    "Split",
    "client_share",
    "encode_prompt",
    "encode_samples",
    "end_token_id",
    "final_answer",
    "label_counts",
    "load_samples",
    "sample_index",
    "skewed_share",
]
