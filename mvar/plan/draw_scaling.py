"""What a simulation found: as text, as numbers, and as a picture of efficiency against GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

from mvar.files.disk import write_file
from mvar.plan.simulate import STAGES, Point, best_of
from mvar.plan.study import Study

COLOURS = {"zero1": "#35618f", "zero2": "#d9822b", "zero3": "#3d8f5f"}


def table(study: Study, points: Sequence[Point]) -> str:
    """The best way for each number of GPUs."""
    cluster, batch = study.assumed.cluster, study.split.global_batch
    lines = [
        f"{study.sizes.parameters:,} parameters, {batch} images a step, nodes of {cluster.gpus} {cluster.gpu.name},"
        f" {cluster.mfu:.0%} of their peak in arithmetic ({study.assumed.mfu_of})",
        f"links: {cluster.links.inside_bytes_s / 1e9:g} GB/s from GPU to GPU inside a node,"
        f" {cluster.links.between_bytes_s / 1e9:g} GB/s out of a node, {cluster.links.share:.0%} of it reached",
        "",
        f"{'GPUs':>6} {'ZeRO':>6} {'recompute':>9} {'micro':>6} {'accum.':>6} {'batch':>7} {'step s':>8} {'waits':>8}"
        f" {'images/s':>10} {'effic.':>7}  what binds",
    ]
    for point in best_of(points).values():
        time = point.time
        grown = " (larger than the recipe's batch)" if point.global_batch > batch else ""
        lines.append(
            f"{point.world:>6} {point.template[-1]:>6} {point.recompute!s:>9} {point.micro_batch:>6}"
            f" {point.accumulation:>6} {point.global_batch:>7,} {time.total_s:>8.3f} {time.waiting_s:>8.3f}"
            f" {point.images_s:>10,.0f} {time.efficiency:>7.0%}  {time.limit}{grown}"
        )
    if not points:
        lines.append("nothing fits, not even one image on a GPU: take larger GPUs (--gpu).")
    return "\n".join(lines)


def figures(study: Study, points: Sequence[Point]) -> dict[str, Any]:
    """All points, and the best of each size. Seconds."""
    best = best_of(points)
    return {
        "parameters": study.sizes.parameters,
        "global_batch": study.split.global_batch,
        "cluster": asdict(study.assumed.cluster),
        "points": [_described(point) for point in points],
        "best": {str(world): _described(point) for world, point in best.items()},
    }


def _described(point: Point) -> dict[str, Any]:
    time = point.time
    more = {"step_s": time.total_s, "efficiency": time.efficiency, "limit": time.limit}
    return asdict(point) | more | {"global_batch": point.global_batch, "images_s": point.images_s}


def picture(study: Study, points: Sequence[Point], path: Path) -> None:
    """A panel for each stage, a line for each micro-batch; rings: the best of all at that size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    best = best_of(points).values()
    drawn, panels = pyplot.subplots(1, len(STAGES), figsize=(12, 4.2), sharey=True, layout="constrained")
    for stage, axes in zip(STAGES, panels, strict=True):
        own = [point for point in points if point.template == stage]
        sizes = sorted({point.micro_batch for point in own})
        for number, micro_batch in enumerate(sizes):
            line = [point for point in own if point.micro_batch == micro_batch]
            shade = 0.25 + 0.75 * (number + 1) / len(sizes)
            worlds, shares = [point.world for point in line], [100 * point.time.efficiency for point in line]
            label = f"{micro_batch}"
            axes.plot(worlds, shares, "o-", color=COLOURS[stage], alpha=shade, markersize=3, label=label)
        rings = [point for point in best if point.template == stage]
        ringed = [point.world for point in rings], [100 * point.time.efficiency for point in rings]
        axes.plot(*ringed, "o", markersize=11, fillstyle="none", color="black", label="best of all" if rings else None)
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 102)
        axes.set_title(f"ZeRO {stage[-1]}", fontsize=10)
        axes.set_xlabel("GPUs")
        axes.legend(fontsize=7, frameon=False, title="images of a micro-batch", title_fontsize=7, loc="lower left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of a step that is useful arithmetic, %")
    gpu = study.assumed.cluster.gpu
    drawn.suptitle(f"{study.sizes.parameters / 1e9:.2f} billion parameters on {gpu.name}", fontsize=10)
    image = BytesIO()
    drawn.savefig(image, format="png", dpi=120)
    pyplot.close(drawn)
    write_file(path, image.getvalue())
