"""A run that is interrupted and started again makes what an undisturbed one makes."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lesft.errors import DataError, InvalidInput
from lesft_client.distillation.journal import open_journal
from tests.distillation.fake_teacher import FakeTeacher, Reply, says, serving
from tests.distillation.harness import make_folder, meta, number_in, right, run, settings_for

PROGRAM = """
import sys
from pathlib import Path
from tests.distillation.harness import run, settings_for
run(settings_for(Path(sys.argv[1]), sys.argv[2], concurrency=2))
"""


def now_and_then_wrong(prompt: str, before: int) -> Reply:
    """The n-th question is right at its first, second or third try, or never."""
    return right(prompt) if number_in(prompt) % 5 == before else says("So\n#### 1")


def undisturbed(tmp_path: Path, count: int) -> bytes:
    with serving(now_and_then_wrong) as teacher:
        settings = settings_for(make_folder(tmp_path / "undisturbed" / "data", count), teacher.url)
        run(settings)
    return settings.output.read_bytes()


def test_an_interrupted_run_goes_on_to_the_same_file(tmp_path: Path) -> None:
    broken = threading.Event()

    def script(prompt: str, before: int) -> Reply:
        if len(teacher.bodies) > 20 and not broken.is_set():
            return Reply(401, {"error": {"message": "expired"}})
        return now_and_then_wrong(prompt, before)

    with serving(script) as teacher:
        settings = settings_for(make_folder(tmp_path / "data", 15), teacher.url, concurrency=1)
        with pytest.raises(
            InvalidInput, match=r"of 15 questions are done and kept in .*; the same"
        ):
            run(settings)
        assert not settings.output.exists()
        done = len(settings.progress_file.read_text().splitlines()) - 1
        assert 3 < done < 15
        broken.set()
        asked = {*teacher.prompts()}
        teacher.bodies.clear()
        run(settings)
        # Of those asked before, only the one that the failure hit is asked again.
        assert len(asked & {*teacher.prompts()}) == 1
    assert settings.output.read_bytes() == undisturbed(tmp_path, 15)
    assert meta(settings)["questions"]["asked"] == 15


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped_goes_on_to_the_same_file(tmp_path: Path, signum: int) -> None:
    gate = threading.Event()

    def script(prompt: str, before: int) -> Reply:
        if len(teacher.bodies) > 15:
            gate.wait(10)
        return now_and_then_wrong(prompt, before)

    with serving(script) as teacher:
        folder = make_folder(tmp_path / "data", 15)
        settings = settings_for(folder, teacher.url, concurrency=2)
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), teacher.url],
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until_it_hangs(teacher)
        process.send_signal(signum)
        _, said = process.communicate(timeout=20)
        gate.set()
        assert not settings.output.exists()
        done = len(settings.progress_file.read_text().splitlines()) - 1
        if signum == signal.SIGINT:
            assert f"{done} of 15 questions are done and kept in" in said
            assert "the same command goes on from there" in said
            assert "twice" not in said
        teacher.bodies.clear()
        run(settings)
        assert len({*teacher.prompts()}) == 15 - done < 15
    assert settings.output.read_bytes() == undisturbed(tmp_path, 15)


def wait_until_it_hangs(teacher: FakeTeacher) -> None:
    deadline = time.monotonic() + 30
    while teacher.busy < 2 or len(teacher.bodies) <= 16:
        assert time.monotonic() < deadline, "the process does not get that far"
        time.sleep(0.02)


def test_a_finished_run_asks_nothing_again(tmp_path: Path) -> None:
    with serving(now_and_then_wrong) as teacher:
        settings = settings_for(make_folder(tmp_path / "data", 5), teacher.url)
        first = run(settings)
        asked = len(teacher.bodies)
        written = settings.output.read_bytes()
        settings.output.unlink()
        assert run(settings) == first
        assert len(teacher.bodies) == asked
    assert settings.output.read_bytes() == written


def test_a_last_line_that_was_torn_is_dropped_and_asked_again(tmp_path: Path) -> None:
    with serving(lambda prompt, before: right(prompt)) as teacher:
        settings = settings_for(make_folder(tmp_path / "data", 4), teacher.url, concurrency=1)
        run(settings)
        written = settings.output.read_bytes()
        progress = settings.progress_file.read_bytes()
        settings.progress_file.write_bytes(progress[:-20])
        teacher.bodies.clear()
        run(settings)
        assert len(teacher.bodies) == 1
    assert settings.output.read_bytes() == written
    assert len(settings.progress_file.read_bytes().splitlines()) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_model": "big"}, "begun with --teacher-model 'small', this is 'big': go on with"),
        ({"tries": 7}, "begun with --tries 4, this is 7: "),
        ({"max_tokens": 9}, "begun with --max-tokens 1024, this is 9: "),
        ({"retry_temperature": 1}, r"begun with --retry-temperature 0\.7, this is 1\.0: "),
        ({"data_seed": 3}, "begun with --data of SHA-256 "),
        ({"samples": 2}, "begun with --data of SHA-256 "),
    ],
)
def test_other_settings_are_no_continuation(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    with serving(lambda prompt, before: right(prompt)) as teacher:
        folder = make_folder(tmp_path / "data", 4)
        settings = settings_for(folder, teacher.url)
        run(settings)
        before = settings.progress_file.read_bytes()
        with pytest.raises(InvalidInput, match=message):
            run(settings_for(folder, teacher.url, **change))
    assert settings.progress_file.read_bytes() == before


def test_pace_and_key_may_change_on_the_way(tmp_path: Path) -> None:
    with serving(lambda prompt, before: right(prompt)) as teacher:
        folder = make_folder(tmp_path / "data", 2)
        run(settings_for(folder, teacher.url))
        (tmp_path / "key").write_text("another")
        run(
            settings_for(
                folder, teacher.url, concurrency=3, teacher_key_file=tmp_path / "key", licence="x"
            )
        )
        assert len(teacher.bodies) == 2


def test_a_damaged_file_is_refused_with_its_line(tmp_path: Path) -> None:
    with serving(lambda prompt, before: right(prompt)) as teacher:
        settings = settings_for(make_folder(tmp_path / "data", 3), teacher.url)
        run(settings)
        lines = settings.progress_file.read_text().splitlines(keepends=True)
        settings.progress_file.write_text(lines[0] + "{}\n" + lines[2])
        with pytest.raises(DataError, match=r"out\.progress\.jsonl:2: is not what this command"):
            run(settings)
        settings.progress_file.write_text(json.dumps([1]) + "\n" + lines[1])
        with pytest.raises(DataError, match=r"out\.progress\.jsonl:1: is not what this command"):
            run(settings)


def test_two_processes_do_not_write_the_same_output(tmp_path: Path) -> None:
    settings = settings_for(make_folder(tmp_path / "data", 1), "http://127.0.0.1:9/v1")
    with (
        open_journal(settings.progress_file, {}),
        pytest.raises(InvalidInput, match="in use by another lesft-client distill"),
    ):
        run(settings)
