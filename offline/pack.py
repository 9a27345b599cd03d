"""`make bundle`: pack what a machine without network lacks into `bundle/`, in the versions that were tested here.

    python offline/pack.py [--python 3.12] [--target-has packages.txt]

The bundle holds wheels of everything in requirements.txt but torch (which has to fit the target's driver and is large),
the sources of mamba-ssm and causal-conv1d, the golden numbers if they are here, and `install.py`, which puts it all to
use there; see docs/offline.md. Run it with the Python of `make setup-dev`: its versions are packed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
ON_TARGET = {"torch", "triton"}
"""Not packed, nor what they alone need."""
KERNELS = ("mamba-ssm", "causal-conv1d")
FOR_KERNELS = ("einops", "packaging", "ninja")
GLIBC = (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)
"""Minor versions of glibc 2 for which wheels are named; pip matches each exactly."""


class PackError(Exception):
    """What was wrong, and what to do."""


def requirements(path: Path) -> dict[str, Requirement]:
    """The packages that a requirements file names."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def closure(roots: Sequence[Requirement]) -> dict[str, SpecifierSet]:
    """Every package that `roots` need, as installed here, with all that is asked of its version."""
    asked: dict[str, SpecifierSet] = {}
    waiting = list(roots)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in ON_TARGET:
            continue
        new = name not in asked
        asked[name] = asked.get(name, SpecifierSet()) & requirement.specifier
        if not new:
            continue
        for text in installed(name).requires or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                waiting.append(needed)
    return asked


def installed(name: str) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise PackError(f"{name} is not installed in {sys.executable}: run make setup-dev first.") from None


def has(target: Path | None) -> dict[str, str]:
    """What `pip list --format=freeze` said on the target: name -> version, empty where the line has none."""
    lines = [] if target is None else target.read_text().split()
    pairs = (line.partition("==") for line in lines)
    return {canonicalize_name(name): version for name, _, version in pairs}


def missing(asked: dict[str, SpecifierSet], there: dict[str, str]) -> Iterator[str]:
    """Names that the target lacks, or has in a version that does not do."""
    for name, specifier in sorted(asked.items()):
        version = there.get(name)
        if version is None or (version and not specifier.contains(version, prereleases=True)):
            yield name


def pip(*arguments: str) -> str | None:
    """What pip says against it; None if it did it. Packages that could compile CUDA code are told not to."""
    names = ("MAMBA_SKIP_CUDA_BUILD", "MAMBA_FORCE_BUILD", "CAUSAL_CONV1D_SKIP_CUDA_BUILD", "CAUSAL_CONV1D_FORCE_BUILD")
    environ = os.environ | dict.fromkeys(names, "TRUE") | {"DS_BUILD_OPS": "0"}
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    return done.stderr.strip()[-2000:] if done.returncode else None


def fetch_wheel(name: str, python: str, machine: str, folder: Path) -> None:
    """The wheel of the version installed here, for the target's Python. Raises PackError where there is none."""
    exact = f"{name}=={installed(name).version}"
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in GLIBC]
    platforms += [f"manylinux2014_{machine}", f"manylinux1_{machine}", f"linux_{machine}"]
    tags = [word for platform in platforms for word in ("--platform", platform)]
    tags += ["--python-version", python, "--implementation", "cp", "--only-binary=:all:"]
    problem = pip("download", "-q", "--no-deps", *tags, "-d", str(folder), exact)
    if problem is None:
        return
    # Sources alone: fine where nothing is compiled.
    built = folder / "built"
    other = pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(built), exact)
    if other is not None:
        raise PackError(
            f"{exact}: no wheel for Python {python} on {machine}:\n{problem}\nnor could it be built: {other}"
        )
    for wheel in built.iterdir():
        if not wheel.name.endswith("-none-any.whl"):
            raise PackError(f"{exact}: no wheel for Python {python}, and it compiles code. Pack it on a like machine.")
        shutil.move(wheel, folder / wheel.name)
    built.rmdir()


def fetch_sources(name: str, folder: Path) -> None:
    """The unpacked sources of a kernel package, in requirements-gpu.txt's version."""
    requirement = requirements(REPOSITORY / "requirements-gpu.txt")[name]
    how = ["--no-deps", "--no-build-isolation", f"--no-binary={name}"]
    problem = pip("download", "-q", *how, "-d", str(folder), str(requirement))
    if problem is not None:
        raise PackError(f"{requirement}: its sources could not be fetched:\n{problem}")
    for archive in folder.glob("*.tar.gz"):
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
        archive.unlink()


def golden_folder() -> Path | None:
    """Where the tests find the golden numbers."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.golden import places

    return next((place for place in places() if place.is_dir()), None)


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--python", default="3.12", help="the target's Python (default 3.12)")
    options.add_argument("--machine", default="x86_64", help="the target's processor: uname -m (default x86_64)")
    options.add_argument("--target-has", type=Path, help="output of `pip list --format=freeze` there: left out")
    options.add_argument("--without", default="", help="packages to leave out, with what they alone need: wandb,...")
    options.add_argument("--out", type=Path, default=REPOSITORY / "bundle", help="default: bundle/")
    args = options.parse_args(argv)
    if not re.fullmatch(r"3\.\d+", args.python):
        options.error(f"--python {args.python}: expected such as 3.12")
    try:
        pack(args.out, args.python, args.machine, has(args.target_has), set(args.without.split(",")))
    except PackError as error:
        print(f"bundle: error: {error}", file=sys.stderr)
        return 2
    return 0


def pack(out: Path, python: str, machine: str, there: dict[str, str], without: set[str]) -> None:
    """Fill `out`. What was built on the target and copied back to `out/built` stays."""
    for part in ("wheels", "src", "golden"):
        shutil.rmtree(out / part, ignore_errors=True)
    wheels, sources = out / "wheels", out / "src"
    wheels.mkdir(parents=True)
    sources.mkdir()
    roots = [need for name, need in requirements(REPOSITORY / "requirements.txt").items() if name not in without]
    asked = closure([*roots, *map(Requirement, FOR_KERNELS)])
    for name in missing(asked, there):
        print(f"wheel of {name} {installed(name).version}", flush=True)
        fetch_wheel(name, python, machine, wheels)
    for name in KERNELS:
        print(f"sources of {name}", flush=True)
        fetch_sources(name, sources)
    golden = golden_folder()
    if golden is not None:
        shutil.copytree(golden, out / "golden")
        for folder in (out / "golden", *(out / "golden").rglob("*/")):
            folder.chmod(0o755)
    for script in ("install.py", "build_conv.py"):
        shutil.copy(HERE / script, out)
    record = {"python": python, "machine": machine, "asked": {name: str(spec) for name, spec in asked.items()}}
    (out / "bundle.json").write_text(json.dumps(record, indent=1) + "\n")
    mib = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 2**20
    print(f"{out}: {mib:.0f} MiB, golden numbers {'included' if golden else 'not found'}")
    print(f"On the target, in its copy of this folder: python3 {out.name}/install.py")


if __name__ == "__main__":
    raise SystemExit(main())
