"""Tests run on the CPU, also where there are GPUs: many of them start two processes, which want a GPU each."""

import os
from collections.abc import Iterator

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, before anything asks torch for them, unless the tests that need one are asked for."""
    asked_for = config.option.markexpr == "gpu" or any("tests/gpu" in argument for argument in config.args)
    if not asked_for or os.environ.get("MVAR_GPU_TESTS_ON", "cuda") != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _restore_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """A command called inside a test may set what its process needs (`engine.deterministic`): no later test sees it."""
    yield from _restore_environment()


@pytest.fixture(scope="module", autouse=True)
def environment_of_a_file() -> Iterator[None]:
    """The same for what the fixtures of a whole file set (`keep_freed_memory`): no later file sees it."""
    yield from _restore_environment()
