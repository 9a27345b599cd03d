"""From a request to a job: what is left open is settled once, by whoever is first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mvar.errors import ConfigError
from mvar.sampling.job import RECORD, SampleJob
from mvar.sampling.loading import ModelPair
from mvar.sampling.options import SamplingOptions
from mvar.sampling.pictures import counts_of
from mvar.sampling.planning import MANY, Request
from mvar.testing.tiny_pairs import write_pair


@pytest.fixture(scope="module")
def request_of_200(tmp_path_factory: pytest.TempPathFactory) -> Request:
    words = write_pair(tmp_path_factory.mktemp("pair"))
    pair = ModelPair.load(Path(words[1]), Path(words[3]))
    return Request(pair, counts_of(range(4), None, 200), SamplingOptions(), 0, torch.device("cpu"))


def test_what_is_left_open_has_defaults(tmp_path: Path, request_of_200: Request) -> None:
    job = request_of_200.settle(tmp_path)
    assert (job.batch, job.part, job.precision, job.compiled) == (8, 64, "fp32", False)
    assert [len(part.pictures) for part in job.parts] == [64, 64, 64, 8]
    assert replace(request_of_200, batch=100).settle(tmp_path / "large").part == 100
    assert replace(request_of_200, batch=999).settle(tmp_path / "larger").batch == 200
    many = replace(request_of_200, counts=counts_of(range(4), None, MANY))
    assert not many.settle(tmp_path / "many").compiled  # On a GPU it would be.


def test_of_two_that_begin_at_once_one_settles_for_both(
    tmp_path: Path, request_of_200: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs with more and less free memory: each has looked before the other wrote."""
    batches, read, blind = iter((32, 8)), SampleJob.read, False
    monkeypatch.setattr(Request, "fitting_batch", lambda *_: next(batches))

    def look(out: Path) -> SampleJob | None:
        nonlocal blind
        was_blind, blind = blind, False
        return None if was_blind else read(out)

    monkeypatch.setattr(SampleJob, "read", look)
    first = request_of_200.settle(tmp_path)
    blind = True
    second = request_of_200.settle(tmp_path)
    assert next(batches, None) is None, "both have chosen"
    assert first.batch == second.batch == 32 and first.sha256 == second.sha256


def test_what_is_said_must_be_what_the_folder_has(tmp_path: Path, request_of_200: Request) -> None:
    request_of_200.settle(tmp_path)
    written = (tmp_path / RECORD).read_bytes()
    for change, named in (
        ({"batch": 4}, "batch: the folder has 8, this command 4"),
        ({"seed": 1}, "seed: the folder has 0"),
        ({"kind": "npz"}, 'kind: the folder has "folders"'),
        ({"precision": "bf16"}, 'precision: the folder has "fp32", this command "bf16"'),
        (
            {"options": SamplingOptions(cfg=(0.0, 1.0, 2.0))},
            r"options.cfg: the folder has 1.5, this",
        ),
        ({"counts": {0: 50, 1: 50, 2: 100}}, "counts.2: the folder has 50, this command 100; counts.3"),
    ):
        with pytest.raises(ConfigError, match=named):
            replace(request_of_200, **change).settle(tmp_path)
    assert (tmp_path / RECORD).read_bytes() == written
    request_of_200.settle(tmp_path)
