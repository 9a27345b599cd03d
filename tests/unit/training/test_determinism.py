"""One switch for everything that would let two runs on GPUs differ."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from mvar.errors import ConfigError
from mvar.training.determinism import SETTINGS, make_deterministic


@pytest.fixture(autouse=True)
def switch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("mamba_ssm", "causal_conv1d"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def test_everything_is_set_and_torch_is_strict() -> None:
    environ: dict[str, str] = {}
    make_deterministic(environ)
    assert environ == {name: fitting[0] for name, fitting in SETTINGS.items()}
    assert environ["MAMBA_DETERMINISTIC"] == environ["CAUSAL_CONV1D_DETERMINISTIC"] == "1"
    assert torch.are_deterministic_algorithms_enabled()
    # Flash attention's backward pass is deterministic only so.
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_other_values_that_fit_are_kept() -> None:
    environ = {"NCCL_ALGO": "Tree", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    make_deterministic(environ)
    assert environ["NCCL_ALGO"] == "Tree" and environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize(("name", "value"), [("NCCL_ALGO", "NVLS"), ("MAMBA_DETERMINISTIC", "0")])
def test_what_contradicts_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}={value}"):
        make_deterministic({name: value})
    assert not torch.are_deterministic_algorithms_enabled()


def test_packages_that_have_already_decided_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", ModuleType("mamba_ssm"))
    with pytest.raises(ConfigError, match="mamba_ssm came before"):
        make_deterministic({})
