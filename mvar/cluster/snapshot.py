"""RUN/snapshot: the code and the configuration a run was begun with, so that editing the checkout changes no chain.

    python -m mvar.cluster.snapshot RUN --config FILE [key=value ...]      prints RUN/snapshot

The first call makes it, later calls only check it, so every job of a chain gives the same command:

    code/           packages mvar and data_prep, ds_configs/, recipes/, slurm/
    config.yaml     the resolved configuration, with absolute paths and engine.ds_config=RUN/snapshot/ds_config.json
    ds_config.json  the DeepSpeed template
    snapshot.json   when, from which folder and git commit, versions of packages, SHA-256 of every file

To run from it, put RUN/snapshot/code first on PYTHONPATH and start `python -m mvar.train` in that folder (or the script
`mvar train` anywhere): `python -m` prefers the working folder, and a checkout there would win.

`--resnapshot` takes the code and configuration as they are now; the old snapshot stays beside as snapshot-1, -2, ...
Complete or absent, and light: needs neither torch nor git.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mvar import shipped
from mvar.cli import run_command
from mvar.config import TrainConfig
from mvar.ds_config import find_template
from mvar.errors import MvarError
from mvar.files.disk import sha256_of, sync_folder, synced, tree_digest
from mvar.log import log
from mvar.paths import is_url, written
from mvar.run.environment import git, versions
from mvar.settings import S, dump, flat, load

SOURCE = shipped.CODE
"""The checkout (or the folder of installed packages) that this very code is read from."""
PACKAGES = ("mvar", "data_prep", *shipped.FOLDERS)
NAME, CODE, CONFIG, RECORD = "snapshot", "code", "config.yaml", "snapshot.json"
TEMPLATE = "ds_config.json"
_FOREIGN_AFTER_S = 3600.0
"""Age at which a half-made snapshot belongs to nobody."""


def take(run: Path, config: TrainConfig, *, replace: bool = False) -> Path:
    """Make RUN/snapshot of this code and `config`; an old one is kept beside under a number. Raises MvarError."""
    if SOURCE.name == CODE and (SOURCE.parent / RECORD).is_file():
        raise MvarError(f"{SOURCE}: this is the code of a snapshot. Start the command from the checkout to replace it.")
    run = Path(os.path.abspath(run))
    final, temporary = run / NAME, run / f".tmp-{NAME}-{os.getpid()}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(run)
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / CODE).mkdir(parents=True)
        for path, here in code_files(SOURCE, shipped.ROOT):
            _write(temporary / CODE / path, here.read_bytes())
        _write(temporary / TEMPLATE, find_template(config.engine.ds_config).read_bytes())
        _write(temporary / CONFIG, dump(_pinned(config, run)).encode())
        aside = _next_number(run)
        record = _describe(temporary, run, replaces=aside.name if replace else None)
        _write(temporary / RECORD, json.dumps(record | {"sha256": tree_digest(record)}, indent=1).encode())
        for folder in [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]:
            sync_folder(folder)
        if replace:
            os.rename(final, aside)
        with contextlib.suppress(FileExistsError):  # Another process was quicker; its snapshot is verified next.
            _rename_new(temporary, final)
        sync_folder(run)
    except OSError as error:
        raise MvarError(f"{final}: cannot be written ({error}). Make room or give a writable run folder.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    verify(run)
    return final


def verify(run: Path) -> dict[str, Any]:
    """The record of RUN/snapshot, after a check of every byte. Raises MvarError that names the file."""
    folder = Path(os.path.abspath(run)) / NAME
    mend = "Put it back, or add --resnapshot to go on with the code as it is now."
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record.pop("sha256") != tree_digest(record):
            raise MvarError(f"{folder / RECORD}: its own digest does not match: it was changed. {mend}")
        here = {path.as_posix() for path in _snapshot_files(folder)}
        for name, sha256 in record["files"].items():
            if name not in here:
                raise MvarError(f"{folder / name}: missing from the snapshot. {mend}")
            if sha256_of(folder / name) != sha256:
                raise MvarError(f"{folder / name}: not the file that the snapshot was made with. {mend}")
        if strange := sorted(here - record["files"].keys()):
            raise MvarError(f"{folder / strange[0]}: does not belong to the snapshot. Remove it, or add --resnapshot.")
        owner = Path(record["run"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MvarError(f"{folder}: damaged ({type(error).__name__}: {error}). {mend}") from None
    if not owner.is_dir() or not owner.samefile(folder.parent):
        raise MvarError(
            f"{folder}: made for run={owner}, found in {folder.parent}. Move the folder back, or add --resnapshot"
            " with --config to go on here."
        )
    return record


def code_files(code: Path, beside: Path) -> Iterator[tuple[Path, Path]]:
    """Files of the packages under `code` and of the shipped folders under `beside`, compiled ones left out: the name
    below the snapshot's code, and the file. Each package in the order of names."""
    for package in PACKAGES:
        root = beside if package in shipped.FOLDERS else code
        for path in sorted((root / package).rglob("*")):
            name = path.relative_to(root)
            if path.is_file() and not {"__pycache__", shipped.IN_WHEEL} & set(name.parts) and path.suffix != ".pyc":
                yield name, path


def drift(run: Path, record: Mapping[str, Any], config: TrainConfig | None) -> list[str]:
    """How what lies here now differs from the snapshot: files of this code, keys of `config` if one is given."""
    then = {name: sha for name, sha in record["files"].items() if name.startswith(f"{CODE}/")}
    now = {f"{CODE}/{path.as_posix()}": sha256_of(here) for path, here in code_files(SOURCE, shipped.ROOT)}
    changed = sorted(name for name in then | now if then.get(name) != now.get(name))
    found = [f"{len(changed)} files of the code, such as {changed[0].removeprefix(CODE + '/')}"] if changed else []
    if config is not None:
        run = Path(os.path.abspath(run))
        # As plain trees: what was kept need not be valid for this code.
        kept = flat(yaml.safe_load((run / NAME / CONFIG).read_text(encoding="utf-8")))
        given = flat(yaml.safe_load(dump(_pinned(config, run))))
        found += [
            f"{key}: {kept.get(key)} in the snapshot, {value} given"
            for key, value in given.items()
            if kept.get(key) != value
        ]
        template = find_template(config.engine.ds_config)
        if sha256_of(template) != record["files"][TEMPLATE]:
            found.append(f"the DeepSpeed template {template}")
    return found


def _pinned(config: TrainConfig, run: Path) -> TrainConfig:
    """`config` with absolute paths, so that it means the same in every working folder; and the template kept here."""
    store = config.data.store
    engine = _absolute(config.engine).model_copy(update={"ds_config": run / NAME / TEMPLATE})
    data = _absolute(config.data).model_copy(update={"store": store if is_url(store) else os.path.abspath(store)})
    return _absolute(config).model_copy(update={"run": run, "engine": engine, "data": data})


def _absolute(section: S) -> S:
    paths = {name: value for name, value in section if isinstance(value, Path)}
    return section.model_copy(update={name: Path(os.path.abspath(path)) for name, path in paths.items()})


def _describe(folder: Path, run: Path, replaces: str | None) -> dict[str, Any]:
    return {
        "time": time.time(),
        "run": str(run),
        "source": str(SOURCE),
        "replaces": replaces,
        **git(PACKAGES),
        "versions": versions(),
        "files": {path.as_posix(): sha256_of(folder / path) for path in _snapshot_files(folder)},
    }


def _snapshot_files(folder: Path) -> Iterator[Path]:
    """Files that count, relative to the snapshot. Running leaves others beside them: compiled code, extensions."""
    for path, _ in code_files(folder / CODE, folder / CODE):
        yield CODE / path
    for name in (CONFIG, TEMPLATE):
        if (folder / name).is_file():
            yield Path(name)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with synced(path) as file:
        file.write(data)


def _rename_new(temporary: Path, final: Path) -> None:
    """Raises FileExistsError: a rename onto a folder that is not empty."""
    try:
        os.rename(temporary, final)
    except OSError:
        if (final / RECORD).is_file():
            raise FileExistsError(final) from None
        raise


def _next_number(run: Path) -> Path:
    numbers = [int(m[1]) for p in run.iterdir() if (m := re.fullmatch(rf"{NAME}-(\d+)", p.name))]
    return run / f"{NAME}-{max(numbers, default=0) + 1}"


def _remove_leftovers(run: Path) -> None:
    for entry in run.glob(f".tmp-{NAME}-*"):
        if time.time() - entry.stat().st_mtime > _FOREIGN_AFTER_S:
            shutil.rmtree(entry, ignore_errors=True)


def _load(path: Path, overrides: Sequence[str], run: Path) -> TrainConfig:
    return load(TrainConfig, path, [*overrides, f"run={written(run)}"])


def _differences(args: argparse.Namespace) -> list[str]:
    """Only damage to the snapshot is an error: whatever became of the checkout must not stop a chain."""
    record = verify(args.run)
    try:
        return drift(args.run, record, _load(args.config, args.overrides, args.run) if args.config else None)
    except (MvarError, OSError, yaml.YAMLError) as error:
        return [str(error)]


def _tell(run: Path, differences: list[str]) -> None:
    if differences:
        lines = "".join(f"\n  {line}" for line in differences)
        log.warning(f"{run / NAME} is used as it is. What lies here now differs:{lines}\n--resnapshot takes it over.")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mvar.cluster.snapshot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--config", type=Path, help="YAML file, such as recipes/d16.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the configuration")
    parser.add_argument("--resnapshot", action="store_true", help="replace the snapshot; the old one is kept")
    args = parser.parse_intermixed_args(argv)

    if not (args.run / NAME).exists():
        if args.config is None:
            raise MvarError(f"{args.run}: has no snapshot yet. Give --config FILE.")
        take(args.run, _load(args.config, args.overrides, args.run))
    elif args.resnapshot:  # Without --config: new code, the old configuration.
        config = _load(args.config or args.run / NAME / CONFIG, args.overrides, args.run)
        take(args.run, config, replace=True)
    else:
        _tell(args.run, _differences(args))
    print(Path(os.path.abspath(args.run)) / NAME, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
