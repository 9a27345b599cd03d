"""`mvar gallery`: a page in the browser to draw from checkpoints, compare them, and see a run's curves.

It is served to this machine alone (127.0.0.1). With --host it can be reached from others, and asks for a password.
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import secrets
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

from mvar.cli import run_command
from mvar.errors import BackendError, ConfigError
from mvar.gallery.entries import entries_of
from mvar.gallery.studio import Studio
from mvar.log import log
from mvar.sampling.loading import pick_device
from mvar.sampling.precision import PRECISIONS

HERE = "127.0.0.1"
PORT = 7860
USER = "mvar"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mvar gallery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--weights", type=Path, nargs="+", required=True, help="run folders, checkpoint folders, .safetensors or .pth")
    add(
        "--tokenizer",
        type=Path,
        nargs="+",
        default=[],
        help="its file, one for all or one for each of --weights (default: the data.tokenizer of a run)",
    )
    add("--ema", action="store_true", help="the moving average of the weights (optim.ema_decay)")
    add("--class-names", type=Path, help="file with a class name a line, or code store (default: the run's code store)")
    add("--precision", choices=("auto", *PRECISIONS), default="auto", help="as of mvar sample (default auto)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)")
    add("--port", type=int, default=PORT, help=f"(default {PORT})")
    add("--host", default=HERE, help=f"address to be reached at, such as 0.0.0.0 (default {HERE}: this machine alone)")
    add("--password-file", type=Path, help=f"its first line is the password of user {USER!r} (default with --host: a "
        "new one, which is printed)")  # fmt: skip
    return parser


def require_library() -> None:
    """Raises BackendError."""
    if importlib.util.find_spec("gradio") is None:
        raise BackendError("mvar gallery needs Gradio, which is not installed: pip install 'mvar-imagegen[gallery]'")


def require_free(host: str, port: int) -> None:
    """Raises ConfigError: another program listens there, or this machine has no such address."""
    if not 0 < port < 2**16:
        raise ConfigError(f"--port {port}: expected 1 to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot be listened on ({error.strerror}). Another program may have "
            "the port: choose another --port."
        ) from None


def is_here(host: str) -> bool:
    """Whether only this machine reaches that address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def password_of(host: str, file: Path | None) -> str | None:
    """None: nobody is asked. Raises ConfigError."""
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--password-file {file}: cannot be read ({error}).") from None
        if not lines or not lines[0].strip():
            raise ConfigError(f"--password-file {file}: its first line is empty; the password is expected there.")
        return lines[0].strip()
    if is_here(host):
        return None
    password = secrets.token_urlsafe(12)
    log.info("gallery: user %s, password %s", USER, password)
    return password


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    require_library()
    entries = entries_of(args.weights, args.tokenizer, ema=args.ema)
    studio = Studio(pick_device(args.device), args.precision, args.class_names)
    require_free(args.host, args.port)
    password = password_of(args.host, args.password_file)
    studio.open(next(iter(entries.values())))  # An error here is better than one at the first click.

    from mvar.gallery.page import Gallery, build, serve

    page = build(Gallery(studio, entries))
    try:
        serve(page, args.host, args.port, None if password is None else (USER, password))
    except OSError as error:
        raise ConfigError(f"--port {args.port}: {error}. Choose another --port.") from None
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    log.info("gallery: http://%s:%d/ shows %d checkpoints; Ctrl-C ends it", args.host, args.port, len(entries))
    ended.wait()
    page.close(verbose=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
