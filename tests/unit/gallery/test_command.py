"""How a gallery is served: to this machine, or with a password; what is wrong is said before anything is loaded."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

import pytest

from mvar.cli import main as mvar
from mvar.errors import BackendError, ConfigError
from mvar.gallery.command import is_here, password_of, require_free, require_library
from mvar.testing.tiny_pairs import write_pair


def test_other_machines_need_a_password_and_this_one_needs_none(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.3.2.1"):
        assert is_here(host) and password_of(host, None) is None
    for host in ("0.0.0.0", "::", "10.1.2.3", "node-7"):
        assert not is_here(host)
        first, second = password_of(host, None), password_of(host, None)
        assert first and second and first != second and len(first) >= 16


def test_a_generated_password_is_told_and_one_of_a_file_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    generated = password_of("0.0.0.0", None)
    assert generated and generated in caplog.text
    (tmp_path / "secret").write_text("  sesame \nrest\n")
    assert password_of("127.0.0.1", tmp_path / "secret") == "sesame" and "sesame" not in caplog.text


@pytest.mark.parametrize("content", ["", "\nx"])
def test_a_password_file_without_a_password_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "secret").write_text(content)
    with pytest.raises(ConfigError, match="first line is empty"):
        password_of("0.0.0.0", tmp_path / "secret")
    with pytest.raises(ConfigError, match="cannot be read"):
        password_of("0.0.0.0", tmp_path / "none")


def test_a_port_in_use_is_named_with_what_to_do() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: cannot be listened on .* choose another --port"):
            require_free("127.0.0.1", port)
    require_free("127.0.0.1", port)
    with pytest.raises(ConfigError, match="expected 1 to 65535"):
        require_free("127.0.0.1", 70000)


def test_without_the_library_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "gradio" else find(name, *more)
    )
    with pytest.raises(BackendError, match=r"pip install 'mvar-imagegen\[gallery\]'"):
        require_library()
    assert mvar(["gallery", *write_pair(tmp_path)]) == 2
    assert "Gradio" in capsys.readouterr().err
