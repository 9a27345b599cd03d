"""What the time of a part of `benchmarks.gpu` goes into, told after its figures: none is lost if this fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

from benchmarks.checkpoint import Run, made_up_batch
from benchmarks.gpu_context import Context
from benchmarks.harness import seconds_of
from benchmarks.host_samples import HostSamples
from benchmarks.idle import analyse, lines
from benchmarks.traces import STEP, phase, recorded

STEPS = 3
"""In a trace."""
TIMED = 10
"""Without the profiler, and again while the host is looked at."""


def profile_training(context: Context, name: str, run: Run) -> None:
    """Steps as `mvar train` makes them: first timed, then with looks at the host's stacks, then under the profiler."""
    with _at_no_cost(context, f"{name}_profile"):
        steps = 1 if context.scale.tiny else TIMED
        take_steps(run, 1)
        step_ms = 1e3 * seconds_of(lambda: take_steps(run, steps)) / steps
        context.add(f"{name}_late_step_ms", step_ms)
        with HostSamples() as samples:
            take_steps(run, steps)
            context.wait()
        context.note(
            f"{name}_host", samples.tables() | {"looks": samples.taken, "seconds": samples.seconds, "steps": steps}
        )
        found = _profile(context, f"{name}_profile", lambda: take_steps(run, STEPS), lambda: take_steps(run, 1))
        if "busy_ms" in found:
            context.add(f"{name}_kernels_ms", found["busy_ms"])
            context.add(f"{name}_kernels", found["kernels"])
            context.add(f"{name}_gpu_busy", found["busy_ms"] / step_ms)
        for title, rows in samples.tables(20).items():
            print(f"  {title}: share of {samples.taken} looks in {samples.seconds:.1f} s")
            for row in rows:
                print(f"    {row['share']:8.3f}  {row['thread']}  {row['where']}", flush=True)


def profile_calls(context: Context, name: str, call: Callable[[], object]) -> None:
    """One call, as one step."""

    def step() -> None:
        with phase(STEP):
            call()

    with _at_no_cost(context, f"{name}_profile"):
        _profile(context, f"{name}_profile", step, call)


def take_steps(run: Run, count: int) -> None:
    """Steps whose numbers are read while the next one is under way, as in `mvar.run.loop`, in phases for a trace."""
    before: Any = None
    with _phases_of(run.engine):
        for _ in range(count):
            with phase(STEP):
                with phase("batch"):
                    batch = made_up_batch(run.config, run.done)
                launched = run.engine.launch(run.done, [batch])
                if before is not None:
                    run.engine.result(before)
                before = launched
            run.done += 1
        run.engine.result(before)


@contextmanager
def _phases_of(engine: Any) -> Iterator[None]:
    """Names for the parts of a step. What lies between them is STEP's: rates, sums over ranks, Mamba's decays."""
    with ExitStack() as stack:
        for name, owner, method in (
            ("forward", type(engine.objective), "__call__"),
            ("backward", engine.model, "backward"),
            ("update", engine.model, "step"),
            ("result", engine, "result"),
        ):
            stack.enter_context(mock.patch.object(owner, method, _in_phase(name, getattr(owner, method))))
        yield


def _in_phase(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def inside(*arguments: Any, **options: Any) -> Any:
        with phase(name):
            return call(*arguments, **options)

    return inside


def _profile(context: Context, key: str, run: Callable[[], object], warm_up: Callable[[], object]) -> dict[str, Any]:
    keep = context.traces / f"{key}.json.gz" if context.traces is not None else None
    found = analyse(recorded(run, warm_up, keep))
    context.note(key, found)
    for line in lines(found):
        print(f"  {line}", flush=True)
    return found


@contextmanager
def _at_no_cost(context: Context, key: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        print(f"  {key} failed: {type(error).__name__}: {error}", flush=True)
        context.note(f"{key}_error", f"{type(error).__name__}: {error}")
