"""Where a GPU waits: from events that are made up, and from a trace of a CPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import idle
from benchmarks.idle import QUEUED, Span, Sums, Timeline, analyse, kind_of, lines
from benchmarks.traces import MEASURED, PHASE, STEP, Event, phase, read, recorded
from tests.golden import REPOSITORY

MAIN, BACKWARD = "100", "200"


def within(name: str, begin: float, end: float) -> Event:
    return Event(PHASE + name, "user_annotation", begin, end, MAIN)


def operation(name: str, begin: float, end: float, thread: str = MAIN) -> Event:
    return Event(name, "cpu_op", begin, end, thread)


def launch(link: int, begin: float, end: float, thread: str = MAIN) -> Event:
    return Event("cudaLaunchKernel", "cuda_runtime", begin, end, thread, link)


def kernel(name: str, begin: float, end: float, link: int | None = None, stream: str = "7") -> Event:
    return Event(name, "kernel", begin, end, stream, link)


def by_name(rows: list[idle.Row]) -> dict[str, float]:
    return {row["name"]: row["ms"] for row in rows}


def test_streams_that_overlap_keep_the_device_busy_once() -> None:
    found = analyse(
        [
            *(within(MEASURED, 0, 10_000), within(STEP, 0, 10_000)),
            *(kernel("a", 1_000, 5_000), kernel("b", 2_000, 7_000, stream="8"), kernel("c", 3_000, 4_000, stream="9")),
            Event("Memcpy DtoH", "gpu_memcpy", 9_000, 9_500),
        ]
    )
    assert found["busy_ms"] == 6.5
    assert found["idle_ms"] == 3.5
    assert found["kernels"] == 4
    assert by_name(found["largest_kernels"]) == {"b": 5, "a": 4, "c": 1, "Memcpy DtoH": 0.5}
    assert by_name(found["kinds"]) == {"other": 10, "copies": 0.5}


def test_figures_are_those_of_one_step() -> None:
    steps = [within(STEP, 0, 4_000), within(STEP, 4_000, 8_000)]
    found = analyse([within(MEASURED, 0, 8_000), *steps, kernel("a", 0, 2_000), kernel("a", 6_000, 8_000)])
    assert (found["steps"], found["step_ms"], found["busy_ms"], found["kernels"]) == (2, 4, 2, 1)


def test_a_wait_is_blamed_on_what_the_launching_thread_does_until_it_has_launched() -> None:
    found = analyse(
        [
            *(within(MEASURED, 0, 20_000), within(STEP, 0, 20_000)),
            *(within("forward", 0, 6_000), within("backward", 8_000, 20_000)),
            *(operation("linear", 0, 3_000), operation("addmm", 500, 3_000), launch(1, 1_000, 2_000)),
            kernel("first", 2_000, 4_000, 1),
            *(operation("MmBackward", 9_000, 13_000, BACKWARD), operation("mm", 10_000, 12_000, BACKWARD)),
            *(launch(2, 11_000, 12_000, BACKWARD), kernel("second", 15_000, 20_000, 2)),
        ]
    )
    assert found["idle_ms"] == 13
    assert found["late_ms"] == 10, "the second was launched three milliseconds before it began"
    assert by_name(found["idle_phases"]) == {"forward": 4, "step": 2, "backward": 4, QUEUED: 3}
    assert by_name(found["idle_outermost"]) == {
        "forward: linear": 2,
        f"forward: {idle.NOTHING}": 2,
        f"step: {idle.NOTHING}": 2,
        f"backward: {idle.NOTHING}": 1,
        "backward: MmBackward": 3,
        f"{QUEUED}: {QUEUED}": 3,
    }
    innermost = by_name(found["idle_innermost"])
    assert innermost["forward: linear"] == 0.5
    assert innermost["forward: addmm"] == 0.5
    assert innermost["backward: cudaLaunchKernel"] == 1
    longest = found["longest_waits"][0]
    assert (longest["ms"], longest["at_ms"], longest["before"]) == (11, 4, "second")


def test_the_host_waits_in_calls_that_wait() -> None:
    found = analyse(
        [
            *(within(MEASURED, 0, 10_000), within(STEP, 0, 8_000), within("update", 2_000, 8_000)),
            *(launch(1, 0, 1_000), kernel("a", 1_000, 7_000, 1)),
            Event("cudaStreamSynchronize", "cuda_runtime", 3_000, 7_000, MAIN, 2),
            Event("cudaDeviceSynchronize", "cuda_runtime", 8_000, 10_000, MAIN, 3),
        ]
    )
    assert found["blocked_ms"] == 4, "what comes after the steps does not count"
    assert (found["launches"], found["launch_us"], found["host_us"]) == (1, 1_000, 4_000)
    waits = {row["name"]: (row["ms"], row["blocked_ms"]) for row in found["host_phases"]}
    assert waits == {"update": (6, 4), STEP: (2, 0), MEASURED: (2, 2)}


def test_what_is_not_measured_does_not_count() -> None:
    found = analyse([kernel("warm", 0, 900), within(MEASURED, 1_000, 2_000), kernel("a", 1_000, 2_000)])
    assert (found["kernels"], found["idle_ms"]) == (1, 0)
    with pytest.raises(ValueError, match="no range"):
        analyse([kernel("a", 0, 1)])


def test_a_trace_without_a_device_tells_of_the_host_alone() -> None:
    found = analyse([within(MEASURED, 0, 1_000), within(STEP, 0, 1_000), operation("mm", 0, 400)])
    assert "busy_ms" not in found
    assert by_name(found["host_operations"]) == {"mm": 0.4}
    assert "no device" in next(lines(found))


def test_nested_operations_are_told_apart_moment_by_moment() -> None:
    timeline = Timeline([operation("out", 10, 50), operation("in", 20, 30), operation("too long", 40, 60)])
    assert list(timeline.between(0, 100)) == [
        Span(0, 10),
        Span(10, 20, "out", "out"),
        Span(20, 30, "out", "in"),
        Span(30, 40, "out", "out"),
        Span(40, 50, "out", "too long"),
        Span(50, 100),
    ]
    assert list(timeline.between(25, 35)) == [Span(25, 30, "out", "in"), Span(30, 35, "out", "out")]
    assert list(Timeline([]).between(1, 2)) == [Span(1, 2)]


def test_what_a_table_leaves_out_is_one_row() -> None:
    sums = Sums()
    for name, us in (("a", 3_000), ("b", 2_000), ("c", 1_000), ("b", 2_000)):
        sums.add(name, us)
    assert sums.rows(1, 1) == [
        {"name": "b", "ms": 4, "times": 2},
        {"name": "(2 more)", "ms": 4, "times": 2},
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x128_16x5_nn_align4>(...)", "matrix products"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, cutlass::bf16>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("_chunk_scan_chunk_state_bwd_dx_kernel", "Mamba"),
        ("_layer_norm_fwd_1pass_kernel", "Mamba"),
        ("void causal_conv1d_bwd_kernel<Causal_conv1d_bwd_kernel_traits<128, 4, true>>", "Mamba"),
        ("triton_poi_fused_mul_silu_0", "fused chains"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer"),
        ("sm80_xmma_fprop_implicit_gemm_bf16f32_tilesize128x128x32_nhwc", "convolutions"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>",
            "elementwise, sums, copies",
        ),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", "elementwise, sums, copies"),
        ("somebody_elses", "other"),
    ],
)
def test_kernels_are_known_by_name(name: str, kind: str) -> None:
    assert kind_of(kernel(name, 0, 1)) == kind


def test_our_kernels_have_names_that_a_profile_tells_apart() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (REPOSITORY / "mvar/model/kernels").glob("*_triton.py")]
    names = [name for text in texts for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)]
    assert names
    assert sorted(set(names)) == sorted(names)
    kinds = {name: kind_of(kernel(name, 0, 1)) for name in names}
    assert set(kinds.values()) <= {"attention", "Mamba", "fused chains"}, kinds


def test_a_trace_that_was_kept_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.ones(8, 8, requires_grad=True)

    def step() -> None:
        with phase(STEP), phase("forward"):
            (x @ x).sum().backward()

    path = tmp_path / "kept" / "step.json.gz"
    events = recorded(step, step, path)
    assert read(path) == events
    found = analyse(events)
    assert found["steps"] == 1, "the warm-up does not count"
    operations = {row["name"]: row["times"] for row in found["host_operations"]}
    assert operations["aten::mm"] == 3
    assert by_name(found["host_phases"])["forward"] > 0
    if not torch.cuda.is_available():
        assert idle.main([str(path)]) == 0
        assert "no device" in capsys.readouterr().out
