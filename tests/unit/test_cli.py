"""The command line: exit codes, and a light import."""

import subprocess
import sys

import pytest

from mvar.cli import COMMANDS, main, run_command
from mvar.errors import MvarError


def test_user_error_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(argv: object) -> int:
        raise MvarError("store x: missing. Run finalize.")

    assert run_command(broken) == 2
    assert capsys.readouterr().err == "mvar: error: store x: missing. Run finalize.\n"


def test_unknown_command_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "train-tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main([command, "--help"]))
    assert stop.value.code == 0
    assert command in capsys.readouterr().out


def test_import_needs_neither_torch_nor_deepspeed() -> None:
    probe = "import sys, mvar; print([m for m in ('torch', 'deepspeed', 'wandb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
