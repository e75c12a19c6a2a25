"""A fixed portion of hostile messages to every decoder; `python -m tests.hostile` sends more."""

from pathlib import Path
from random import Random

import pytest
import torch

from lesft.errors import BundleError, DataError, InvalidInput, one_line
from lesft.micro_batch import StepKey
from lesft.step_messages import check_samples, micro_batch_to_message
from lesft.tensors import TensorSpec, decode_tensors
from lesft_aggregator.adapters import read_layout
from lesft_client.data.rows import read_rows
from lesft_server.handshake import check_opening
from tests.hostile.decoders import REFUSALS, all_decoders, run_decoders
from tests.hostile.lying_safetensors import lying_safetensors, many_tensors
from tests.hostile.mutate import mutate_message, records, varint
from tests.hostile.served_decoders import FROZEN, SPEC
from tests.server.harness import make_batch, opening

MESSAGES = 85
"""To each decoder."""


def test_every_decoder_refuses_hostile_messages_by_the_rules_or_decodes_them_within_these(
    tmp_path: Path,
) -> None:
    decoders = all_decoders(tmp_path)
    outcomes = run_decoders(decoders, MESSAGES * len(decoders), seed=1, measure_every=20)
    assert [fault for outcome in outcomes.values() for fault in outcome.faults] == []
    assert {outcome.messages for outcome in outcomes.values()} == {MESSAGES}
    for name, outcome in outcomes.items():
        assert outcome.refused.total() > 0, name
        assert name in ("refusals", "TOML") or outcome.decoded > 0, name
        assert outcome.peak_bytes < 12 << 20, name


def test_a_decoder_that_fails_otherwise_or_lets_a_lie_through_is_found() -> None:
    def raising(random: Random) -> None:
        raise KeyError("x")

    def wrong(random: Random) -> None:
        assert random.random() > 1

    outcomes = run_decoders({"raising": raising, "wrong": wrong}, 4)
    assert [len(outcome.faults) for outcome in outcomes.values()] == [2, 2]
    assert outcomes["raising"].faults[0] == "0:raising:0: KeyError: 'x'"


def test_a_seed_names_a_message_for_good() -> None:
    message = opening(SPEC, "a", instance_id="i")
    mutations = [mutate_message(Random(seed), message) for seed in range(300)]
    assert mutations == [mutate_message(Random(seed), message) for seed in range(300)]
    valid = message.SerializeToString()
    assert 10 < mutations.count(valid) < 100
    assert len(set(mutations)) > 150
    _, data = micro_batch_to_message(make_batch(StepKey(0, 0)), "raw")
    lies = [lying_safetensors(Random(seed), data) for seed in range(100)]
    assert lies.count(data) < 60
    assert len(set(lies)) > 40


def test_records_are_those_of_the_wire_format() -> None:
    assert varint(300) == b"\xac\x02"
    assert records(b"\x08\x96\x01\x12\x03abc") == [(1, 0, b"\x96\x01"), (2, 2, b"\x03abc")]


# ---------------------------------------------------------------------- what was found and mended


def test_a_header_of_many_empty_tensors_is_refused_before_it_is_read() -> None:
    """Read, it would take 20 times its size in memory and hold everyone up for a second."""
    bomb = many_tensors(100_000)
    with pytest.raises(BundleError, match="its header has 5630097 bytes, but at most 4352"):
        decode_tensors(bomb, {"hidden": TensorSpec((1, 4), (torch.float32,))})
    with pytest.raises(BundleError, match="its header has 5630097 bytes, but at most 1048576"):
        read_layout(bomb)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 1 << 41}, "num_samples must be at most 1099511627776"),
        ({"checkpoint_rounds": [1] * 65}, "checkpoint_rounds must have at most 64 entries, got 65"),
    ],
)
def test_an_opening_cannot_claim_all_the_weight_or_make_the_server_search_for_seconds(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        check_opening(opening(SPEC, **changes).open, SPEC)


def test_a_refusal_repeats_little_of_what_was_sent() -> None:
    request = opening(SPEC, run_id="x" * 1_000_000)
    with pytest.raises(Exception, match="run_id: server lesft, client x") as caught:
        check_opening(request.open, SPEC)
    assert isinstance(caught.value, REFUSALS)
    assert len(str(caught.value)) < 300
    header, _ = micro_batch_to_message(make_batch(StepKey(0, 0)), "raw")
    header.samples.append(0)
    header.enclosed.extend([0] * 500_000)
    with pytest.raises(InvalidInput, match="enclosed must have at most 1 entries") as refused:
        check_samples(header, FROZEN, 3)
    assert len(str(refused.value)) < 100


def test_one_line_of_megabytes_costs_no_time_and_says_that_it_was_cut() -> None:
    line = one_line("a \u202e" * 1_000_000)
    assert line.startswith("a a a")
    assert line.endswith("…")
    assert one_line(" " * 20_000 + "b") == "…"


def test_a_number_of_too_many_digits_in_a_data_file_is_named_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "p", "target": "t"}\n{"prompt": ' + "9" * 5000 + "}\n")
    with pytest.raises(DataError, match=r"data\.jsonl:2: holds a number of too many digits"):
        list(read_rows(file))
