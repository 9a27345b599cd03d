"""A study as text for people, and as a picture of memory by ZeRO stage."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from mvar.files.disk import write_file
from mvar.plan.step_time import Cluster
from mvar.plan.study import Study

GIB = 2**30
COLOURS = {
    "weights": "#35618f",
    "gathered": "#8fb3d6",
    "gradients": "#d9822b",
    "optimizer": "#3d8f5f",
    "activations": "#b8434e",
    "logits": "#e3a5ab",
    "communication": "#8c8c8c",
}
"""Categories of memory, from the axis outwards."""


KEPT = {"off": "keep all", "selective": "keep matmuls", "every": "recompute"}


def gib(count: float) -> str:
    return f"{count / GIB:.1f}" if count < 99.95 * GIB else f"{count / GIB:,.0f}"


def table(study: Study) -> str:
    """The whole plan on one screen."""
    figures, cluster = study.figures(), study.assumed.cluster
    gpu = cluster.gpu
    recipe, sent, work, time, saved = (figures[k] for k in ("recipe", "traffic", "flops", "time", "checkpoint"))
    source = "of the code store" if study.measured_store else "(no code store found: ImageNet's)"
    lines = [
        f"model     {study.sizes.parameters:,} parameters, {study.sizes.tokens} tokens an image",
        f"data      {study.images:,} images {source}",
        f"cluster   {cluster.nodes} x {cluster.gpus} {gpu.name}: {gib(gpu.usable_bytes)} of"
        f" {gpu.memory_gib:g} GiB planned with, {gpu.bf16_tflops:g} TFLOP/s at best, {cluster.mfu:.0%} reached"
        f" ({study.assumed.mfu_of})",
        _links(cluster),
        f"batch     {study.split.global_batch} images = {study.split.ranks} ranks x {study.split.micro_batch}"
        f" x {study.split.accumulation} accumulated"
        + (f" (engine.micro_batch {study.config.engine.micro_batch} does not divide it)" if study.adjusted else ""),
        "",
        f"the recipe: {recipe['ds_config']}, {recipe['precision']},"
        f" recompute {recipe['activation_checkpointing']}; GiB:",
        "  " + "  ".join(f"{name} {gib(count)}" for name, count in recipe["bytes"].items()),
        f"  peak {gib(recipe['peak_bytes'])}: {'fits' if recipe['fits'] else 'DOES NOT FIT'}"
        + (f"; host {gib(recipe['host_bytes'])} a rank" if recipe["host_bytes"] else "")
        + (f"; disk {gib(recipe['disk_bytes'])} a rank" if recipe["disk_bytes"] else ""),
        "",
        "every template at its largest micro-batch that fits (GiB a rank; sent: messages of a step; step: seconds;",
        "waits: those of them that wait for messages; effic.: share of the step that is arithmetic done once):",
        f"  {'engine.ds_config':15} {'recompute':9} {'micro':>5} {'weights':>8} {'grads':>7} {'optim':>7}"
        f" {'activ.':>7} {'logits':>7} {'buffers':>7} {'peak':>7} {'host':>6} {'disk':>6}"
        f" {'sent':>6} {'step':>7} {'waits':>7} {'effic.':>6}",
    ]
    for option in study.options:
        held, state = option.memory.categories(), option.memory.state
        mark = "*" if option is study.best else " "
        lines.append(
            f"{mark} {option.template:15} {option.recompute!s:9} {option.micro_batch or '-':>5}"
            f" {gib(held['weights']):>8} {gib(held['gradients']):>7} {gib(held['optimizer']):>7}"
            f" {gib(held['activations']):>7} {gib(held['logits']):>7}"
            f" {gib(held['communication'] + held['gathered']):>7} {gib(option.memory.peak):>7}"
            f" {gib(state.host):>6} {gib(state.disk):>6} {gib(option.traffic.on_the_wire):>6}"
            f" {option.time.total_s:>7.3f} {option.time.waiting_s:>7.3f} {option.time.efficiency:>6.0%}"
        )
    best = figures["best"]
    if best:
        lines.append("  * take: " + " ".join(f"{key}={value}" for key, value in best.items()))
    else:
        lines.append("  nothing fits, not even one image: take more GPUs, or larger ones.")
    lines += [
        "  - in the column micro: not even one image fits, and the row shows one image.",
        "",
        f"messages  of a step, the recipe's: all-reduce {gib(sent['all_reduce'])}, reduce-scatter"
        f" {gib(sent['reduce_scatter'])}, all-gather {gib(sent['all_gather'])} GiB handed over by a rank;"
        f" {gib(sent['on_the_wire'])} GiB sent in rings",
        f"work      {work['training_per_token'] / 1e6:,.0f} MFLOP a token,"
        f" {work['training_per_image'] / 1e12:.2f} TFLOP an image for a training step;"
        f" conditioning {work['conditioning'] / work['forward_per_image']:.2%} of it,"
        f" attention {work['attention'] / work['forward_per_image']:.1%}, scan"
        f" {work['scan'] / work['forward_per_image']:.1%}",
        *_time_lines(study, time),
        f"saving    {saved['bytes'] / 1e9:,.1f} GB a checkpoint, {saved['write_s']:,.0f} s at"
        f" {study.assumed.disk_bytes_s / 1e9:g} GB/s if training waits; with a failure every"
        f" {study.assumed.mtbf_s / 3600:g} h save every {saved['best_interval_s'] / 60:,.0f} minutes"
        f" (checkpoint.every_steps={saved['best_interval_steps']}): {saved['time_lost']:.1%} of the time lost",
    ]
    return "\n".join(lines)


def _links(cluster: Cluster) -> str:
    links, between = cluster.links, ""
    if cluster.nodes > 1:
        between = f", {links.between_bytes_s / 1e9:g} GB/s out of a node, {links.between_hop_s * 1e6:g} us a hop"
    inside = f"{links.inside_bytes_s / 1e9:g} GB/s from GPU to GPU inside a node, {links.inside_hop_s * 1e6:g} us a hop"
    return f"links     {inside}{between}; {links.share:.0%} of it reached"


def _time_lines(study: Study, time: dict[str, Any]) -> list[str]:
    """Of the recipe."""
    parts = [f"arithmetic {time['arithmetic_s']:.3f}"]
    parts += [f"recomputation {time['repeated_s']:.3f}"] if time["repeated_s"] else []
    parts += [f"waiting for messages {time['waiting_s']:.3f} of their {time['messages_s']:.3f}"]
    parts += [f"host {time['host_s']:.3f}"] if time["host_s"] else []
    cost = ""
    if time["cost_per_million_images"] is not None:
        cost = f", {time['cost_per_million_images']:,.2f} for a million images at the given price"
    return [
        f"time      the recipe's: {time['steps']:,} steps of {time['step_s']:.3f} s ({', '.join(parts)};"
        f" what binds: {time['limit']})",
        f"          efficiency {time['efficiency']:.0%},"
        f" {1000 * time['gpu_seconds_per_image']:,.1f} GPU-ms an image{cost};"
        f" {time['images_seen']:,} images: {time['gpu_days']:,.0f} GPU-days, {time['days']:,.1f} days on"
        f" {study.assumed.world} GPUs",
    ]


def picture(study: Study, path: Path) -> None:
    """Memory of a GPU for each template, without and with recomputation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    options = study.options
    labels = [
        f"{option.template}\n{KEPT[str(option.recompute)]}\n"
        + (f"{option.micro_batch} images" if option.micro_batch else "1 image")
        for option in options
    ]
    figure, axes = pyplot.subplots(figsize=(max(7, 1.15 * len(options)), 4.6), layout="constrained")
    bottoms = [0.0] * len(options)
    for name, colour in COLOURS.items():
        heights = [option.memory.categories()[name] / GIB for option in options]
        axes.bar(range(len(options)), heights, bottom=bottoms, color=colour, label=name, width=0.72)
        bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    gpu = study.assumed.cluster.gpu
    axes.axhline(gpu.usable_bytes / GIB, color="black", linewidth=1, linestyle="--")
    axes.annotate(
        f"planned with: {gib(gpu.usable_bytes)} of {gpu.memory_gib:g} GiB",
        (len(options) - 0.5, gpu.usable_bytes / GIB),
        ha="right",
        va="bottom",
        fontsize=8,
    )
    axes.set_xticks(range(len(options)), labels, fontsize=8)
    for tick, option in zip(axes.get_xticklabels(), options, strict=True):
        tick.set_fontweight("bold" if option is study.best else "normal")
    axes.set_ylim(0, max(gpu.memory_gib, min(max(bottoms), 2 * gpu.memory_gib)) * 1.02)
    axes.set_ylabel("GiB of a GPU")
    axes.set_title(
        f"{study.sizes.parameters / 1e9:.2f} billion parameters on {study.assumed.world} x {gpu.name},"
        f" {study.config.engine.precision}: the largest micro-batch that fits",
        fontsize=10,
    )
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, reverse=True)
    axes.spines[["top", "right"]].set_visible(False)
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    pyplot.close(figure)
    write_file(path, drawn.getvalue())
