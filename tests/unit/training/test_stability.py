"""Which steps count as bad."""

from __future__ import annotations

import math

import pytest
from pydantic import TypeAdapter

from mvar.checkpoint.record import KnownSteps, Progress
from mvar.config import TrainConfig
from mvar.run.loop import Votes
from mvar.schedule import BatchPhase
from mvar.training.engine import Averages, StepResult
from mvar.training.stability import KNOWN, WINDOW, DivergedError, Stability
from mvar.training.starting import known_steps


def step(loss: float = 6.0, norm: float | None = 1.0, *, skipped: bool = False, **changes: object) -> StepResult:
    whole: dict[str, object] = {
        "lr": 1e-4,
        "weight_decay": 0.05,
        "bad_samples": [],
        "loss_scale": None,
        "votes": Votes(),
        "forward_s": [0.1],
    }
    averages = Averages(8, loss, [loss], 0.04, [0.04])
    return StepResult(averages=averages, grad_norm=norm, skipped=skipped, **(whole | changes))  # type: ignore[arg-type]


def test_a_spike_is_far_above_the_usual_and_only_once_the_usual_is_known() -> None:
    watch = Stability(10, 20)
    assert watch.judge(0, step(loss=50, norm=80)) is None
    for number in range(KNOWN):
        assert watch.judge(number, step(6 + 0.02 * math.sin(number), 1 + 0.2 * math.cos(number))) is None
    assert watch.judge(90, step(loss=6.2, norm=2.0)) is None
    assert "loss 9, usually 6" in (watch.judge(91, step(loss=9)) or "")
    assert "gradient norm 40" in (watch.judge(92, step(norm=40)) or "")
    assert watch.judge(93, step(loss=3, norm=0.1)) is None  # Better than usual is no fault.
    assert Stability(10, 0).judge(0, step(loss=1e9)) is None


def test_bad_steps_in_a_row_end_it_and_a_good_one_between_forgives() -> None:
    bad = {"norm": None, "skipped": True, "bad_samples": [4]}
    watch = Stability(3, 20)
    assert watch.judge(5, step(math.nan, **bad)) and watch.judge(6, step(math.nan, **bad))  # type: ignore[arg-type]
    assert watch.judge(7, step()) is None
    watch.judge(8, step(math.nan, **bad))  # type: ignore[arg-type]
    watch.judge(9, step(norm=None, skipped=True))
    with pytest.raises(DivergedError, match="steps 8 to 10: loss or gradient is not finite") as caught:
        watch.judge(10, step(math.nan, **bad))  # type: ignore[arg-type]
    assert (caught.value.first, caught.value.done) == (8, 11)


def test_fp16_looking_for_its_loss_scale_is_not_bad() -> None:
    watch = Stability(1, 20)
    assert watch.judge(0, step(norm=None, skipped=True, loss_scale=65536.0)) is None
    with pytest.raises(DivergedError):
        watch.judge(1, step(norm=None, skipped=True, loss_scale=65536.0, bad_samples=[3]))


def through_a_checkpoint(known: KnownSteps) -> KnownSteps:
    progress = TypeAdapter(Progress).validate_json(TypeAdapter(Progress).dump_json(Progress(40, known_steps=known)))
    assert progress.known_steps is not None
    return progress.known_steps


def test_whoever_resumes_knows_the_steps_before_and_sees_a_spike_at_once() -> None:
    watch = Stability(10, 20)
    for number in range(2 * WINDOW):
        assert watch.judge(number, step(6 + math.sin(number) / 70, 1 + math.cos(number) / 7)) is None
    resumed = Stability(10, 20, through_a_checkpoint(watch.known()))
    assert resumed.known() == watch.known()
    assert resumed.judge(300, step(loss=9)) == watch.judge(300, step(loss=9)) != None  # noqa: E711
    assert resumed.judge(301, step(norm=40)) == watch.judge(301, step(norm=40)) != None  # noqa: E711


def test_bad_steps_in_a_row_are_counted_over_a_resume() -> None:
    watch = Stability(3, 20)
    watch.judge(5, step(norm=None, skipped=True))
    watch.judge(6, step(norm=None, skipped=True))
    resumed = Stability(3, 20, through_a_checkpoint(watch.known()))
    with pytest.raises(DivergedError, match="steps 5 to 7"):
        resumed.judge(7, step(norm=None, skipped=True))


def test_what_is_known_can_always_be_written_down() -> None:
    watch = Stability(10, 20)
    watch.judge(0, step(loss=math.inf, norm=math.nan))
    watch.judge(1, step())
    assert through_a_checkpoint(watch.known()).loss == (6.0,)


def test_another_global_batch_and_older_checkpoints_begin_anew() -> None:
    known = KnownSteps((6.0,), (1.0,), 1, 0)
    config = TrainConfig.model_validate({"run": "r", "data": {"store": "s"}, "global_batch": 8})
    phases = (BatchPhase(0, 0, 4), BatchPhase(10, 40, 8))
    assert known_steps(Progress(12, stretches=phases, known_steps=known), config) == known
    assert known_steps(Progress(9, stretches=phases[:1], known_steps=known), config) is None
    assert known_steps(Progress(12, stretches=phases), config) is None
    assert known_steps(Progress(), config) is None
