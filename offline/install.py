"""Put a bundle to use on the machine it was packed for, without network: `python3 bundle/install.py`.

Installs the wheels that this Python lacks into `bundle/site`, adds the kernels of mamba-ssm and causal-conv1d, and
writes `bundle/env.sh`, to be sourced before `mvar`, `make test-gpu` or `make bench-gpu`. Nothing outside the bundle is
changed. causal-conv1d's extension is built once for a kind of machine and kept in `bundle/built`: copy that folder back
to the bundle you packed, and the next machine need not build it. Standard library, pip and torch alone are needed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pip._vendor.packaging.specifiers import SpecifierSet
from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename

BUNDLE = Path(__file__).resolve().parent
SITE = BUNDLE / "site"
EXTENSION = "causal_conv1d_cuda"
ENVIRONMENT = """\
# Written by install.py: source it.
export PYTHONPATH="{site}:{repository}${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONUNBUFFERED=1
export MVAR_GOLDEN="${{MVAR_GOLDEN:-{bundle}/golden}}" WANDB_MODE="${{WANDB_MODE:-offline}}"
# Compiled code belongs on a local disk: many processes starting at once would wait for a shared one.
export TRITON_CACHE_DIR="${{TRITON_CACHE_DIR:-/tmp/triton-$(id -un)}}"
export TORCHINDUCTOR_CACHE_DIR="${{TORCHINDUCTOR_CACHE_DIR:-/tmp/inductor-$(id -un)}}"
export TORCH_EXTENSIONS_DIR="${{TORCH_EXTENSIONS_DIR:-/tmp/torch_extensions-$(id -un)}}"
"""
CHECK = """
import importlib, os
os.environ.setdefault("DS_ACCELERATOR", "cuda" if __import__("torch").cuda.is_available() else "cpu")
for name in ("torch", "triton", "deepspeed", "pydantic", "webdataset", "causal_conv1d",
             "mamba_ssm.ops.triton.ssd_combined", "mvar"):
    try:
        module = importlib.import_module(name)
        print(f"  {name:36} {getattr(module, '__version__', 'imported')}")
    except Exception as error:
        print(f"  {name:36} NOT: {type(error).__name__}: {str(error).strip()[:200]}")
"""


def say(began_s: float, text: str) -> None:
    print(f"[{time.monotonic() - began_s:4.0f} s] {text}", flush=True)


def lacking(wheels: Sequence[Path], asked: dict[str, str]) -> list[Path]:
    """The wheels whose package this Python has not, or in a version that does not do."""
    found = []
    for wheel in wheels:
        name = canonicalize_name(parse_wheel_filename(wheel.name)[0])
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(wheel)
            continue
        if not SpecifierSet(asked.get(name, "")).contains(version, prereleases=True):
            found.append(wheel)
    return found


def install_wheels(began_s: float) -> None:
    wheels = lacking(
        sorted((BUNDLE / "wheels").glob("*.whl")), json.loads((BUNDLE / "bundle.json").read_text())["asked"]
    )
    shutil.rmtree(SITE, ignore_errors=True)
    SITE.mkdir()
    quiet = ["-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
    if wheels:
        command = [sys.executable, "-m", "pip", "install", *quiet, "--target", str(SITE), *map(str, wheels)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"install: error: {done.stderr.strip()}")
    say(began_s, f"{len(wheels)} packages into {SITE}: {', '.join(wheel.name.split('-')[0] for wheel in wheels)}")


def add_kernel_packages(began_s: float) -> None:
    """The Python part of both. mamba_ssm's own __init__ imports Mamba-1's extension and models mvar has no use for."""
    for name in ("mamba_ssm", "causal_conv1d"):
        source = next((BUNDLE / "src").glob(f"{name}-*"))
        shutil.copytree(source / name, SITE / name, dirs_exist_ok=True)
        version = source.name.partition("-")[2]
        if name == "mamba_ssm":
            (SITE / name / "__init__.py").write_text(f'__version__ = "{version}"\n')
        say(began_s, f"{name} {version}")


def machine_tag(arch: str) -> str:
    """What a built extension depends on."""
    import torch

    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return f"{python}-torch{torch.__version__}-sm{arch.replace('.', '')}-{os.uname().machine}"


def loads(extension: Path) -> bool:
    """Whether it can be imported here: one that was built beside a newer C library cannot."""
    command = [sys.executable, "-c", f"import torch, {EXTENSION}"]
    environ = os.environ | {"PYTHONPATH": str(extension.parent)}
    return subprocess.run(command, capture_output=True, check=False, env=environ).returncode == 0


def architecture(asked: str | None) -> str | None:
    import torch

    if asked is None and torch.cuda.is_available():
        return "{}.{}".format(*torch.cuda.get_device_capability())
    return asked


def add_extension(began_s: float, arch: str | None) -> None:
    if arch is None:
        say(began_s, f"{EXTENSION} is not built: no GPU is seen here. Run this on a GPU node, or give --arch 9.0")
        return
    tag = machine_tag(arch)
    built = BUNDLE / "built" / tag / f"{EXTENSION}.so"
    if built.is_file() and loads(built):
        say(began_s, f"{EXTENSION} taken from built/{tag}")
    else:
        source = next((BUNDLE / "src").glob("causal_conv1d-*"))
        command = [sys.executable, str(BUNDLE / "build_conv.py"), str(source), str(built), arch]
        # The packed ninja is in the site.
        environ = os.environ | {"PYTHONPATH": str(SITE), "PATH": f"{SITE / 'bin'}:{os.environ['PATH']}"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
        if done.returncode:
            print("\n".join((done.stdout + done.stderr).splitlines()[-30:]), file=sys.stderr)
            say(
                began_s,
                f"{EXTENSION} could not be built (above): mvar takes its own kernels, model.mamba_backend=triton",
            )
            return
        say(began_s, f"{EXTENSION} built for {arch}; kept in built/{tag}")
    shutil.copy(built, SITE / built.name)


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--arch", help="compute capability to build for, such as 9.0 (default: this machine's GPU)")
    options.add_argument("--no-extension", action="store_true", help="do not build causal-conv1d's extension")
    args = options.parse_args(argv)
    began_s = time.monotonic()
    install_wheels(began_s)
    add_kernel_packages(began_s)
    environ = ENVIRONMENT.format(site=SITE, repository=BUNDLE.parent, bundle=BUNDLE)
    (BUNDLE / "env.sh").write_text(environ)
    if not args.no_extension:
        add_extension(began_s, architecture(args.arch))
    script = f'. "{BUNDLE}/env.sh" && exec "{sys.executable}" -c "$CHECK"'
    subprocess.run(["bash", "-c", script], env=os.environ | {"CHECK": CHECK}, check=False)
    say(began_s, f"done. Now: . {BUNDLE}/env.sh")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
