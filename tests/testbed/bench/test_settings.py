"""The settings of the bench, and the table of parts."""

import os
from pathlib import Path

import pytest

from lesft.settings import load_settings
from lesft_testbed.bench.parts import PARTS, make_part
from lesft_testbed.bench.settings import BenchSettings


def settings_of(*argv: str) -> BenchSettings:
    return load_settings(BenchSettings, "bench", list(argv))


def message(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit):
        settings_of(*argv)
    return capsys.readouterr().err.splitlines()[0]


def test_all_parts_are_measured_unless_some_are_named() -> None:
    assert settings_of().parts == tuple(PARTS)
    assert settings_of("--parts=wire,overhead").parts == ("wire", "overhead")


def test_parts_that_are_none_or_come_twice_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = message(capsys, "--parts=wire,overhed")
    assert said.startswith(f"bench: --parts: must be of {', '.join(PARTS)}; overhed is none")
    assert "(did you mean overhead?)" in said
    assert "must name each part once" in message(capsys, "--parts=wire,wire")


def test_a_parts_own_options_have_its_name(tmp_path: Path) -> None:
    assert settings_of("--wire.clients=2", "--overhead.rounds=9").wire.clients == 2
    file = tmp_path / "bench.toml"
    file.write_text('parts = ["wire"]\n[wire]\nepochs = 5\n')
    settings = settings_of(f"--config={file}")
    assert (settings.parts, settings.wire.epochs, settings.wire.clients) == (("wire",), 5, 4)


def test_threads_are_all_cores_unless_a_number_is_given() -> None:
    assert settings_of().num_threads == os.cpu_count()
    assert settings_of("--threads=1").num_threads == 1


def test_each_row_of_the_table_is_a_part_of_that_name_that_names_real_settings() -> None:
    for name in PARTS:
        part = make_part(name)
        assert part.name == name
        assert set(part.depends_on) <= BenchSettings.model_fields.keys()
        assert len({figure.name for figure in part.figures}) == len(part.figures) > 0
