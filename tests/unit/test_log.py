"""One voice: who says what, where, and that it can fail without harm."""

from __future__ import annotations

import ast
import logging
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from mvar.cli import run_command
from mvar.errors import MvarError
from mvar.log import Chosen, log, speaking, tell, write_to
from tests.golden import REPOSITORY

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


def say_everything() -> None:
    log.info("step 1 of %d", 2)
    log.warning("no room")
    log.error("nothing works")


def test_rank_0_says_everything_with_the_time_and_what_is_loud_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with speaking({}):
        say_everything()
    said = capsys.readouterr()
    assert re.fullmatch(rf"{TIME} step 1 of 2\n", said.out)
    assert re.fullmatch(rf"{TIME} WARNING: no room\nmvar: error: nothing works\n", said.err)


@pytest.mark.parametrize("environ", [{"RANK": "3"}, {"SLURM_PROCID": "3"}])
def test_other_ranks_say_errors_alone_and_who_they_are(
    capsys: pytest.CaptureFixture[str], environ: dict[str, str]
) -> None:
    with speaking(environ):
        say_everything()
    said = capsys.readouterr()
    assert said.out == "" and said.err == f"mvar: error: rank 3 on {socket.gethostname()}: nothing works\n"


def test_under_slurm_every_rank_has_its_file_over_all_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for start in ("first", "second"):
        for rank in (0, 12345):
            environ = {"SLURM_JOB_ID": "7", "SLURM_PROCID": str(rank)}
            with speaking(environ):
                write_to(tmp_path / "logs", environ)
                log.info("the %s start", start)
                log.warning("not the fastest way")
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["rank-00000.log", "rank-12345.log"]
    lines = (tmp_path / "logs" / "rank-12345.log").read_text().splitlines()
    host = re.escape(socket.gethostname())
    expected = [("INFO", "the first start"), ("WARNING", "not the fastest way")]
    expected += [("INFO", "the second start"), ("WARNING", "not the fastest way")]
    for line, (level, text) in zip(lines, expected, strict=True):
        assert re.fullmatch(rf"{TIME}\.\d\d\d {host} rank 12345 {level} {text}", line)
    assert len(capsys.readouterr().out.splitlines()) == 2  # Rank 0 is on the console as well.


def test_without_slurm_there_is_no_file(tmp_path: Path) -> None:
    with speaking({}):
        write_to(tmp_path / "logs", {})
        log.info("a line")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_a_command_is_in_the_ranks_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("RANK", "2")

    def main(_: Any) -> int:
        write_to(tmp_path)
        raise MvarError("store x: missing.")

    assert run_command(main) == 2
    assert (tmp_path / "rank-00002.log").read_text().endswith("rank 2 ERROR store x: missing.\n")


class Broken:
    """A console or a disk that takes nothing."""

    def write(self, _: str) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        pass


def test_a_console_or_a_disk_that_takes_nothing_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with speaking({}):
        write_to(tmp_path / "file", {"SLURM_JOB_ID": "7"})
        assert "what rank 0 says is not kept there" in capsys.readouterr().err
        write_to(tmp_path / "logs", {"SLURM_JOB_ID": "7"})
        for handler in log.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.setStream(Broken())  # type: ignore[arg-type]
        monkeypatch.setattr("sys.stdout", Broken())
        log.info("into the void")
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_a_program_that_uses_mvar_as_a_library_hears_it_as_any_other_logger(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    before = list(log.handlers)
    with speaking({}):
        assert len(log.handlers) == len(before) + 1
    assert log.handlers == before and log.propagate
    log.warning("a damaged checkpoint")
    assert [record.getMessage() for record in caplog.records] == ["a damaged checkpoint"]
    assert capsys.readouterr() == ("", "")


COMMANDS = """cli demo doctor evaluate evaluate_checkpoints evaluate_model evaluate_tokenizer export import_published
    inspect_checkpoint merge_samples reference report sample scrub status verify_step"""
ROOMS = """mvar/plan/command mvar/training/dry_run mvar/cluster/chain mvar/cluster/scripts mvar/cluster/snapshot
    data_prep/calibrate data_prep/finalize data_prep/inspect data_prep/tokenize data_prep/verify
    data_prep/prepare/digits data_prep/prepare/emoji data_prep/prepare/fashion"""
RESULTS = {"mvar/log.py", *(f"mvar/{name}.py" for name in COMMANDS.split()), *(f"{name}.py" for name in ROOMS.split())}
"""Files that print what a command was asked for."""


def test_only_results_are_printed() -> None:
    printing = set()
    for path in (*(REPOSITORY / "mvar").rglob("*.py"), *(REPOSITORY / "data_prep").rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        if any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls):
            printing.add(path.relative_to(REPOSITORY).as_posix())
    assert printing - RESULTS == set(), "what a command says while it works goes through mvar.log"


def test_what_was_decided_is_told_with_the_reason_and_loudly_where_it_is_slow(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with speaking({}):
        tell(
            [
                Chosen("attention", "varlen"),
                Chosen("CPU threads", "4 a rank", "8 cores are shared by 2 ranks here"),
                Chosen("mamba", "torch", "mamba-ssm cannot be imported (undefined symbol: x)", slow=True),
            ]
        )
    said = capsys.readouterr()
    assert [line[20:] for line in said.out.splitlines()] == [
        "attention: varlen",
        "CPU threads: 4 a rank, because 8 cores are shared by 2 ranks here",
    ]
    assert said.err[20:] == "WARNING: mamba: torch, because mamba-ssm cannot be imported (undefined symbol: x)\n"
