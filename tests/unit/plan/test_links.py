"""Time of messages, and of the steps that hide them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mvar.cli import main
from mvar.errors import ConfigError
from mvar.plan.gpus import GPUS
from mvar.plan.links import NETWORKS, Links, Timed, fit
from mvar.plan.memory import Setup
from mvar.plan.simulate import best_of, sizes_between
from mvar.plan.step_time import Cluster, composed
from mvar.plan.traffic import Collective, Traffic

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
GB = 10**9
PLAIN = Links(100e9, 10e9, inside_hop_s=0.0, between_hop_s=0.0, share=1.0)


def test_large_messages_take_the_time_of_their_bytes_on_the_slowest_link() -> None:
    assert PLAIN.collective_s("all_reduce", GB, 1, 4) == pytest.approx(2 * 3 / 4 * GB / 100e9)
    assert PLAIN.collective_s("reduce_scatter", GB, 2, 4) == pytest.approx(7 / 8 * GB / 10e9)
    assert PLAIN.collective_s("all_gather", GB, 2, 4) == pytest.approx(7 * GB / 10e9)
    assert replace(PLAIN, share=0.5).collective_s("all_gather", GB, 2, 4) == pytest.approx(14 * GB / 10e9)
    assert PLAIN.collective_s("all_reduce", GB, 1, 1) == 0


def test_small_messages_take_the_time_of_their_hops_and_an_all_reduce_climbs_a_tree() -> None:
    links = Links(100e9, 10e9, inside_hop_s=1e-6, between_hop_s=10e-6, share=1.0)
    ring_s = 16 * 10e-6 + 112 * 1e-6
    assert links.collective_s("reduce_scatter", 1, 16, 8, messages=5) == pytest.approx(5 * ring_s, rel=1e-3)
    assert links.collective_s("all_reduce", 1, 16, 8) == pytest.approx(2 * (4 * 10e-6 + 7 * 1e-6), rel=1e-3)


def test_a_fit_finds_the_constants_that_times_were_made_with() -> None:
    true = Links(3e9, 3e9, inside_hop_s=2e-5, between_hop_s=2e-5, share=1.0)
    measured = [
        Timed(world, size, 2 * world * 2e-5 + 2 * (world - 1) / world * size / 3e9)
        for world in (2, 4)
        for size in (1000, 10**6, 10**8)
    ]
    found = fit(measured)
    assert (found.inside_bytes_s, found.inside_hop_s) == pytest.approx((true.inside_bytes_s, true.inside_hop_s))
    with pytest.raises(ConfigError, match="two sizes"):
        fit(measured[:1])


def test_a_pass_hides_what_fits_into_it_but_for_the_first_message() -> None:
    cluster = Cluster(2, 4, GPUS["h100-80gb"], 0.4, PLAIN)
    gathered = (Collective("all_gather", GB, 10),)  # 0.7 s
    for forward_s, waiting_s in ((1.0, 0.07), (0.5, 0.2)):
        hidden = composed(forward_s, 0.0, Traffic(8, forward=gathered, overlaps=True), cluster)
        assert hidden.waiting_s == pytest.approx(waiting_s) and hidden.messages_s == pytest.approx(0.7)
        assert hidden.total_s == pytest.approx(3 * forward_s + waiting_s)
    assert composed(1.0, 0.0, Traffic(8, forward=gathered), cluster).waiting_s == pytest.approx(0.7)
    assert composed(1.0, 0.0, Traffic(8, after=gathered, overlaps=True), cluster).waiting_s == pytest.approx(0.7)
    recomputed = composed(0.25, 1.0, Traffic(8, backward=gathered, overlaps=True), cluster)
    assert (recomputed.repeated_s, recomputed.waiting_s) == pytest.approx((0.25, 0.07))
    assert recomputed.efficiency == pytest.approx(0.75 / 1.07) and recomputed.limit == "arithmetic"


# Narayanan et al. 2021 (arXiv 2104.04473), table 2: ZeRO 3 without model parallelism on A100s with 80 GB, 8 adapters of
# 200 Gb/s a node, 2,048 tokens, everything recomputed. Parameters (10^9), GPUs, micro-batch, TFLOP/s of a GPU.
PUBLISHED = ((174.6, 384, 4, 144), (174.6, 768, 2, 88), (174.6, 1536, 1, 44))
PUBLISHED += ((529.6, 640, 4, 138), (529.6, 1120, 2, 98), (529.6, 2240, 1, 48))


def predicted_tflops(billions: float, gpus: int, micro_batch: int, mfu: float, share: float) -> float:
    cluster = Cluster(gpus // 8, 8, GPUS["a100-80gb"], mfu, Links(300e9, 200e9, share=share))
    forward = 2 * billions * 1e9 * micro_batch * 2048
    part, layers = round(2e9 * billions / gpus), 100
    gather, scatter = Collective("all_gather", part, layers), Collective("reduce_scatter", part * gpus, layers)
    sent = Traffic(gpus, forward=(gather,), backward=(gather, scatter), overlaps=True)
    time = composed(forward / (cluster.gpu.bf16_tflops * 1e12 * mfu), 1.0, sent, cluster)
    return 4 * forward / time.total_s / 1e12


def test_two_constants_explain_six_published_speeds_of_zero_3() -> None:
    """The fastest row gives the arithmetic's share, the slowest of that model the links'; the rest is predicted."""
    mfu, share = 144 / 312, 0.0813
    errors = [predicted_tflops(b, n, m, mfu, share) / published - 1 for b, n, m, published in PUBLISHED]
    print([f"{error:+.0%}" for error in errors])
    assert abs(errors[2]) < 0.02
    assert all(abs(error) < 0.15 for error in errors)


def plan(tmp_path: Path, *words: str) -> dict:
    path = tmp_path / "plan.json"
    assert main(["plan", "--config", str(RECIPES / "d32.yaml"), "--nodes", "16", "--json", str(path), *words]) == 0
    return json.loads(path.read_text())


def test_a_plan_counts_messages_and_says_what_binds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    time = plan(tmp_path)["time"]
    said = capsys.readouterr().out
    assert "what binds: messages" in said and "400 GB/s out of a node" in said
    assert time["step_s"] > time["arithmetic_s"] + time["repeated_s"] and 0 < time["efficiency"] < 1
    slow = plan(tmp_path, "--network", "eth-100", "--price-gpu-hour", "2")
    assert slow["time"]["step_s"] > 8 * time["step_s"]
    gpu_s = slow["time"]["gpu_seconds_per_image"]
    assert gpu_s == pytest.approx(slow["time"]["step_s"] * 128 / 1024)
    assert slow["time"]["cost_per_million_images"] == pytest.approx(gpu_s * 2 / 3600 * 1e6)


def test_the_plan_takes_what_is_fastest_with_the_links_at_hand(tmp_path: Path) -> None:
    options = {network: plan(tmp_path, "--network", network) for network in ("ib-ndr", "eth-25")}
    for study in options.values():
        fitting = [one for one in study["options"] if one["largest_micro_batch"]]
        best = study["best"]
        (taken,) = (
            one
            for one in fitting
            if best["engine.ds_config"] == f"ds_configs/{one['ds_config']}.json"
            and best["engine.activation_checkpointing"] == one["activation_checkpointing"]
        )
        assert taken["step_s"] <= 1.01 * min(one["step_s"] for one in fitting)


def test_one_gpu_waits_for_nobody(tmp_path: Path) -> None:
    time = plan(tmp_path, "--nodes", "1", "--gpus", "1", "global_batch=8", "engine.activation_checkpointing=off")[
        "time"
    ]
    assert time["messages_s"] == 0 and time["efficiency"] == 1


def test_a_plan_takes_the_speed_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = [json.dumps({"kind": "train", "step": step, "mfu": 0.1 if step < 30 else 0.31}) for step in range(60)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = plan(tmp_path, "--measured", str(run))
    assert (
        found["cluster"]["mfu"] == pytest.approx(0.31) and f"31% reached (measured: {run})" in capsys.readouterr().out
    )
    command = ["plan", "--config", str(RECIPES / "d32.yaml")]
    (run / "metrics.jsonl").write_text("\n".join(lines[:5]) + "\n")
    assert main([*command, "--measured", str(run)]) == 2
    assert "5 steps with an mfu, expected 20" in capsys.readouterr().err
    assert main([*command, "--measured", str(run), "--mfu", "0.3"]) == 2
    assert main([*command, "--measured", str(tmp_path)]) == 2


def test_a_simulation_names_the_best_way_for_each_number_of_gpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan(tmp_path, "--simulate", "8..4096", "--png", str(tmp_path / "scaling.png"))
    assert list(found["best"]) == [str(8 * 2**power) for power in range(10)]
    assert {point["template"] for point in found["points"]} == {"zero1", "zero2", "zero3"}
    shares = [point["efficiency"] for point in found["best"].values()]
    assert shares[0] > 0.95 and shares[-1] < 0.2
    for point in found["points"]:
        assert point["global_batch"] == max(1024, point["world"])
        best = found["best"][str(point["world"])]
        assert point["micro_batch"] < 4 or point["images_s"] <= 1.01 * best["images_s"]
    said = capsys.readouterr().out
    assert "4096" in said and "larger than the recipe's batch" in said
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--network", "token-ring"], "Known: ib-xdr"),
        (["--simulate", "8-4096"], "expected FIRST..LAST"),
        (["--simulate", "64..8"], "LAST not below it"),
        (["--link-share", "0"], "expected a number above 0"),
        (["--link-gb-s", "nan"], "expected a number above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(RECIPES / "d12.yaml"), *words]) == 2
    assert message in capsys.readouterr().err


def test_words_and_presets() -> None:
    assert sizes_between("6..50") == [6, 12, 24, 48]
    assert NETWORKS["ib-ndr"].of_node(8) == 400 and NETWORKS["eth-100"].of_node(8) == 12.5
    assert best_of([]) == {}
    assert Setup(2, "bf16", 8).accumulation == 1
