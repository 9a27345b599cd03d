"""Packing for a machine without network, and installing there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from offline import build_conv, pack
from tests.golden import REPOSITORY


def test_everything_that_requirements_need_is_packed_but_torch() -> None:
    asked = pack.closure(list(pack.requirements(REPOSITORY / "requirements.txt").values()))
    assert {"deepspeed", "pydantic", "pydantic-core", "webdataset", "numpy"} <= asked.keys()
    assert "torch" not in asked and "triton" not in asked and not any(name.startswith("nvidia") for name in asked)
    assert asked["deepspeed"].contains("0.19.8") and not asked["deepspeed"].contains("0.19.7")
    exact = {specifier.operator for specifier in asked["pydantic-core"]}
    assert "==" in exact, "pydantic needs one version of it"


def test_what_the_target_has_is_left_out_unless_its_version_does_not_do(tmp_path: Path) -> None:
    listed = tmp_path / "packages.txt"
    listed.write_text("PyYAML==6.0.2\nPydantic==1.10\nnumpy\n")
    asked = {"pyyaml": SpecifierSet(">=6"), "pydantic": SpecifierSet(">=2.7"), "numpy": SpecifierSet(">=1.26")}
    asked["webdataset"] = SpecifierSet("==1.0.2")
    assert list(pack.missing(asked, pack.has(listed))) == ["pydantic", "webdataset"]


def test_a_package_that_is_not_here_is_named() -> None:
    with pytest.raises(pack.PackError, match="no-such-package"):
        pack.closure([Requirement("no-such-package")])


def test_each_pair_of_types_is_compiled_by_itself() -> None:
    """Together the parts instantiate what the file does, each once."""
    body = "template<typename A, typename B>\nvoid run(Params &params, cudaStream_t stream) {}\n\n"
    lines = [
        f"template void {name}<{types}>(Params &params, cudaStream_t stream);\n"
        for name in ("run", "other_run")
        for types in ("float, float", "at::Half, float", "at::BFloat16, at::BFloat16")
    ]
    parts = build_conv.split(body + "".join(lines)).values()
    assert len(parts) == 3
    assert all(body in part for part in parts)
    for line in lines:
        assert sum(line in part for part in parts) == 1
    assert all(part.count("template void") == 2 for part in parts)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of one made-up package, one that is there already, and kernel packages without kernels."""
    folder = tmp_path / "bundle"
    (folder / "wheels").mkdir(parents=True)
    for name, version in (("made_up_for_mvar", "1.2"), ("packaging", "99.0")):
        write_wheel(folder / "wheels", name, version)
    for package in ("mamba_ssm", "causal_conv1d"):
        source = folder / "src" / f"{package}-9.9" / package
        source.mkdir(parents=True)
        (source / "__init__.py").write_text("raise ImportError('needs an extension')\n")
    (folder / "bundle.json").write_text(json.dumps({"asked": {"made-up-for-mvar": "", "packaging": ">=20"}}))
    (folder / "install.py").write_text((REPOSITORY / "offline/install.py").read_text())
    return folder


def write_wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", f"__version__ = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def install(bundle: Path, *arguments: str) -> str:
    command = [sys.executable, str(bundle / "install.py"), *arguments]
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_installing_adds_what_is_missing_and_says_so(bundle: Path) -> None:
    """What is there in a version that does is left alone; the environment it writes finds the new packages."""
    said = install(bundle)
    assert "1 packages" in said and "made_up_for_mvar" in said
    assert (bundle / "site/made_up_for_mvar").is_dir() and not (bundle / "site/packaging").exists()
    assert "no GPU is seen here" in said
    check = "import mamba_ssm, made_up_for_mvar; print(mamba_ssm.__version__)"
    script = f". {bundle}/env.sh; {sys.executable} -c '{check}'"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "9.9"
    assert "1 packages" in install(bundle), "a second run does the same"
