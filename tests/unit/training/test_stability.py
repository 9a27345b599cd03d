"""Which steps count as bad."""

from __future__ import annotations

import math

import pytest

from mvar.run.loop import Votes
from mvar.training.engine import Averages, StepResult
from mvar.training.stability import KNOWN, DivergedError, Stability


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
