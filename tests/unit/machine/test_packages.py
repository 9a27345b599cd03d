"""Optional packages are tried where they can do no harm, and what is wrong with them is said."""

from pathlib import Path

import pytest

from mvar.machine import packages
from mvar.machine.findings import Finding
from mvar.machine.packages import Package, install_command, look, pinned

STAND_INS = {
    "fine": "__version__ = '1.2'\n",
    "crashing": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n",
    "leaving": "import os\nos._exit(3)\n",
    "half": "import an_extension_that_is_not_there\n",
    "talking": "print('I am imported')\n__version__ = '2'\n",
    "hanging": "import time\ntime.sleep(60)\n",
}


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Finding]:
    """What is said of each stand-in on a machine with a GPU."""
    for name, text in STAND_INS.items():
        (tmp_path / f"doctor_{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(packages, "IMPORT_WITHIN_S", 15.0)
    asked = [Package(f"doctor-{name}", f"doctor_{name}", "a test") for name in (*STAND_INS, "absent")]
    return {finding.name.removeprefix("doctor-"): finding for finding in look(True, asked)}


def test_each_package_is_judged_by_itself(found: dict[str, Finding]) -> None:
    assert (found["fine"].text, found["fine"].state) == ("1.2", "good")
    assert (found["talking"].text, found["talking"].state) == ("2", "good")
    assert "SIGSEGV" in found["crashing"].text and found["crashing"].state == "bad"
    assert "exit code 3" in found["leaving"].text and found["leaving"].state == "bad"
    assert "an_extension_that_is_not_there" in found["half"].text and found["half"].state == "bad"
    assert "longer than 15 s" in found["hanging"].text and found["hanging"].state == "bad"
    assert "not installed" in found["absent"].text and found["absent"].state == "missing"
    assert found["absent"].fix == "pip install 'doctor-absent'"


def test_without_a_gpu_kernels_are_no_fault() -> None:
    asked = [
        Package("doctor-absent", "doctor_absent", "a test"),
        Package("other", "doctor_other", "b", needs_gpu=False),
    ]
    kernel, other = look(False, asked)
    assert (kernel.state, kernel.fix) == ("missing", "")
    assert (other.state, other.fix) == ("missing", "pip install 'other'")


def test_what_is_to_be_installed_is_the_version_that_is_tested() -> None:
    by_name = {package.name: package for package in packages.PACKAGES}
    assert pinned("mamba-ssm").startswith("mamba-ssm==") and pinned("deepspeed").startswith("deepspeed==")
    assert install_command(by_name["mamba-ssm"]) == f"pip install --no-build-isolation '{pinned('mamba-ssm')}'"
    assert install_command(by_name["apex"]).startswith("#"), "the index has an unrelated package of that name"
