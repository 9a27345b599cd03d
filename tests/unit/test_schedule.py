"""Schedules and parameter groups against the official implementation, and their edges."""

import math

import pytest

from mvar.config import TrainConfig
from mvar.schedule import BatchPhase, Plan, decays, lr_share, weight_decay
from tests.golden import golden_json


def test_lr_and_weight_decay_equal_the_published_ones() -> None:
    runs = golden_json("schedules", "lr_wd.json")
    assert {run["config"]["sche"] for run in runs.values()} == {"lin0", "lin00", "lin", "cos", "exp", "lin0.3"}
    for run in runs.values():
        c = run["config"]
        for row in run["rows"]:
            share = lr_share(row["it"], c["max_it"], round(c["wp_it"]), c["wp0"], c["wpe"], c["sche"])
            assert c["peak_lr"] * share == pytest.approx(row["lr"], rel=1e-12)
            decay = weight_decay(row["it"], c["max_it"], c["wd"], c["wd_end"])
            assert decay == pytest.approx(row["wd_decay_group"], rel=1e-12)


def test_parameter_groups_equal_the_published_ones() -> None:
    groups = golden_json("schedules", "param_groups_mvar_tiny.json")
    shapes = {entry["name"]: entry["shape"] for entry in _tiny_shapes()}
    for expected, names in ((True, groups["decay"]), (False, groups["no_decay"])):
        for name in names:
            assert decays(name, len(shapes[name])) is expected, name


def _tiny_shapes() -> list[dict[str, object]]:
    from tests.golden import golden

    return [
        {"name": name, "shape": list(value.shape)} for name, value in golden("mvar_tiny", "state.safetensors").items()
    ]


def plan(images: int = 1000, **changes: object) -> Plan:
    tree: dict[str, object] = {"run": "r", "data": {"store": "s"}, "epochs": 2, "global_batch": 100}
    return Plan.of(TrainConfig.model_validate(tree | changes), images)


def test_a_changed_batch_goes_on_at_the_same_share_of_the_images() -> None:
    whole, config = plan(images=1000, epochs=4), {"epochs": 4, "global_batch": 200}
    tree: dict[str, object] = {"run": "r", "data": {"store": "s"}} | config
    changed = Plan.of(TrainConfig.model_validate(tree), 1000, (BatchPhase(0, 0, 100), BatchPhase(15, 1500, 200)))
    straight = Plan.of(TrainConfig.model_validate(tree), 1000)
    assert whole.last_step == 40 and changed.last_step == 15 + math.ceil(2500 / 200)
    assert [changed.samples(step) for step in (0, 14, 15, 16)] == [0, 1400, 1500, 1700]
    assert changed.peak_lr == 2 * whole.peak_lr
    assert changed.lr(15) == pytest.approx((straight.lr(7) + straight.lr(8)) / 2)  # Between two of its steps.
    assert changed.is_over(28, 4000) and not changed.is_over(27, 3900)


def test_length_counts_images_not_batches_per_epoch() -> None:
    assert plan(images=1000).total_steps == 20
    assert plan(images=1001).total_steps == 21
    assert plan(images=1049, epochs=4).total_steps == math.ceil(4 * 1049 / 100)
    assert plan(images=10, epochs=0.5).total_steps == 1


def test_max_steps_cuts_the_run_but_not_the_schedule() -> None:
    whole, cut = plan(), plan(max_steps=7)
    assert (cut.last_step, cut.total_steps) == (7, 20)
    assert [cut.lr(step) for step in range(7)] == [whole.lr(step) for step in range(7)]


def test_peak_scales_with_the_batch_and_warm_up_defaults_to_a_fiftieth() -> None:
    a = plan(images=10_000, epochs=50, global_batch=512)
    assert a.peak_lr == pytest.approx(2e-4)
    assert a.warmup_steps == round(10_000 / 512)
    assert a.lr(0) == pytest.approx(0.005 * 2e-4)
    assert a.lr(a.warmup_steps) == pytest.approx(2e-4)
    assert a.lr(a.total_steps - 1) == pytest.approx(0.1 * 2e-4)


@pytest.mark.parametrize("kind", ["lin0", "lin00", "lin", "cos", "exp", "lin0.3"])
def test_shortest_runs_have_a_finite_rate(kind: str) -> None:
    for total in (1, 2, 3):
        for warmup in range(total + 1):
            for step in range(total):
                assert 0 < lr_share(step, total, warmup, 0.005, 0.1, kind) <= 1
    assert weight_decay(0, 1, 0.05, 0.08) == pytest.approx(0.05)


def test_finer_scales_join_one_by_one_between_warm_up_and_the_given_share() -> None:
    config = {"optim": {"progressive": 0.5, "progressive_scales": 7, "warmup_epochs": 0.2}, "epochs": 10}
    made = plan(images=1000, **config)  # 100 steps, 2 of warm-up; all ten scales from step 50 on
    scales = [made.curriculum_at(step).scales for step in range(100)]
    assert scales[:2] == [7, 7] and scales == sorted(scales) and scales[50:] == [10] * 50
    assert [scales.index(count) for count in (8, 9, 10)] == [11, 26, 43]
    assert {made.curriculum_at(step).newest_weight for step in range(100)} == {1.0}
    assert plan().curriculum_at(0).scales == plan().curriculum_at(19).scales == 10


def test_a_new_scale_gains_weight_over_its_ramp() -> None:
    optim = {"progressive": 0.5, "progressive_scales": 7, "warmup_epochs": 0.2, "progressive_warmup_epochs": 0.8}
    made = plan(images=1000, optim=optim, epochs=10)  # A ramp of 8 steps.
    weights = [made.curriculum_at(step).newest_weight for step in range(10, 26)]
    assert weights[0] == 1.0 and weights[1] < 0.2 and weights[9] == 1.0  # From step 11 to 19.
    assert weights[1:10] == sorted(weights[1:10])
    assert made.curriculum_at(60).newest_weight == 1.0


@pytest.mark.parametrize("kind", ["lin0", "lin00", "lin", "cos", "exp", "lin0.3"])
@pytest.mark.parametrize(("batch", "step", "samples"), [(200, 15, 1500), (300, 15, 1500), (64, 7, 700), (100, 7, 1950)])
def test_no_last_step_goes_beyond_the_end_of_the_schedule(kind: str, batch: int, step: int, samples: int) -> None:
    """Another batch, or images that a rollback skipped, leave steps between those of the schedule."""
    optim = {"schedule": kind, "final_lr": 0.0, "base_lr": 1e-4, "weight_decay": 0.0, "weight_decay_end": 0.1}
    tree = {"run": "r", "data": {"store": "s"}, "epochs": 2, "global_batch": batch, "optim": optim}
    phases = (BatchPhase(0, 0, 100), BatchPhase(step, samples, batch))
    changed = Plan.of(TrainConfig.model_validate(tree), 1000, phases)
    rates = [changed.lr(number) for number in range(step, changed.last_step)]
    decays = [changed.decay(number) for number in range(step, changed.last_step)]
    assert rates and min(rates) >= 0 and rates[-1] == min(rates) and rates == sorted(rates, reverse=True)
    assert decays == sorted(decays) and decays[-1] <= 0.1
