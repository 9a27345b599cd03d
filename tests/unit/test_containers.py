"""Container files and the CI workflow, which cannot be run here: they parse, agree, and name what exists."""

from __future__ import annotations

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from mvar import shipped
from tests.golden import REPOSITORY

INSTRUCTIONS = {"ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "LABEL", "RUN", "SHELL", "USER", "WORKDIR"}
SECTIONS = {"files", "post", "environment", "runscript", "labels", "help", "test", "startscript", "setup"}
NEEDED = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "mvar", "data_prep", *shipped.FOLDERS}
"""What a wheel is built from."""


def dockerfile(text: str) -> list[tuple[str, str]]:
    """Instructions and their arguments. Raises ValueError, as a build would refuse the file."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    found = [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined)]
    if bad := [name for name, rest in found if name not in INSTRUCTIONS or not rest]:
        raise ValueError(f"{bad[0]!r} is no instruction")
    if next(name for name, _ in found if name != "ARG") != "FROM":
        raise ValueError("nothing but ARG may stand before FROM")
    declared: set[str] = set()
    for name, rest in found:
        used = set(re.findall(r"\$\{?(\w+)", re.sub(r"\$\(.*?\)", "", rest))) - {"PATH"}
        if unknown := used - declared:
            raise ValueError(f"{unknown.pop()} is not declared")
        declared |= {rest.partition("=")[0]} if name == "ARG" else set()
    return found


def definition(text: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Header and sections of an Apptainer definition. Raises ValueError."""
    header: dict[str, str] = {}
    sections: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        if line.startswith("%"):
            lines = sections.setdefault(line[1:].strip(), [])
            if line[1:].strip() not in SECTIONS:
                raise ValueError(f"{line} is no section")
        elif lines is not None:
            lines.append(line)
        elif line.strip() and not line.startswith("#"):
            key, colon, value = line.partition(":")
            if not colon:
                raise ValueError(f"{line!r} is neither a key nor in a section")
            header[key.strip().lower()] = value.strip()
    return header, sections


def pip_calls(shell: str) -> list[str]:
    """The installations of a script, without what the environment says before them."""
    calls = re.findall(r"pip install [^&\n]*", re.sub(r"\\\n\s*", "", shell))
    return [call.strip() for call in calls]


def parses(shell: str) -> bool:
    return subprocess.run(["sh", "-n"], input=shell, text=True, capture_output=True, check=False).returncode == 0


DOCKER = (REPOSITORY / "containers/Dockerfile").read_text()
APPTAINER = (REPOSITORY / "containers/mvar.def").read_text()


def test_the_dockerfile_parses_and_copies_what_a_wheel_needs() -> None:
    found = dockerfile(DOCKER)
    assert all(parses(rest) for name, rest in found if name == "RUN")
    copied = {word for name, rest in found if name == "COPY" for word in rest.split()[:-1]}
    assert copied >= NEEDED and all((REPOSITORY / name).exists() for name in copied)
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*" and copied <= {line[1:] for line in ignored if line.startswith("!")}
    assert any(fnmatch("slurm/site.env", line) for line in ignored[1:])  # A site's own stays at the site.


def test_the_definition_parses_and_installs_the_same() -> None:
    header, sections = definition(APPTAINER)
    assert header["bootstrap"] == "docker" and {"files", "post", "environment"} <= sections.keys()
    assert all(parses("\n".join(sections[name])) for name in ("post", "environment", "runscript"))
    copied = {line.split()[0] for line in sections["files"] if line.strip()}
    assert copied >= NEEDED and all((REPOSITORY / name).exists() for name in copied)
    found = dockerfile(DOCKER)
    (base,) = (rest for name, rest in found if name == "FROM")
    arguments = dict(rest.split("=", 1) for name, rest in found if name == "ARG")
    assert header["from"] == base.replace("${CUDA}", arguments["CUDA"])
    runs, post = "\n".join(rest for name, rest in found if name == "RUN"), "\n".join(sections["post"])
    assert pip_calls(runs) == pip_calls(post) and len(pip_calls(post)) == 4
    packages = [re.findall(r"apt-get install (.*?)(?:&&|\n)", text)[0].split() for text in (runs, post)]
    assert packages[0] == packages[1]


@pytest.mark.parametrize("line", ["RUNN pip", "COPY", "RUN echo ${NOWHERE}"])
def test_a_planted_fault_is_found(line: str) -> None:
    with pytest.raises(ValueError, match=r"instruction|declared"):
        dockerfile(f"{DOCKER}\n{line}\n")


def test_the_workflow_runs_what_we_run_on_every_python_that_is_promised() -> None:
    path = Path(REPOSITORY / ".github/workflows/ci.yml")
    (job,) = yaml.safe_load(path.read_text())["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    promised = re.findall(r"Python :: (3\.\d+)", (REPOSITORY / "pyproject.toml").read_text())
    assert job["strategy"]["matrix"]["python"] == promised
