"""What a training of the transformer shows on the terminal."""

from __future__ import annotations

from mvar.durations import duration
from mvar.evaluation.run_record import one_line
from mvar.files.json_lines import JsonRecord
from mvar.run.tracking import place


class TransformerLines:
    """One aligned line every `every` steps, with means since the line before; a line for a validation and samples."""

    def __init__(self, every: int, last_step: int) -> None:
        self._every, self._last_step = every, last_step
        self._since: list[JsonRecord] = []

    def __call__(self, record: JsonRecord) -> str | None:
        where = place(record, self._last_step)
        if record["kind"] == "train":
            self._since.append(record)
            if record["step"] % self._every == 0 or record["step"] == self._last_step or record["skipped"]:
                since, self._since = self._since, []
                return f"{where}  {self._status(since)}"
        elif record["kind"] == "val":
            return f"{where}  validation loss {_show(record['loss'])}  acc {100 * (record['accuracy'] or 0):5.2f}%"
        elif record["kind"] == "sample":
            return f"{where}  samples: {record['file']}"
        elif record["kind"] == "evaluation":
            return f"{where}  {record['images']:,} samples: {one_line(record)}"
        return None

    def _status(self, since: list[JsonRecord]) -> str:
        now = since[-1]
        step_s = sum(record["step_s"] for record in since)
        wait = 100 * sum(record["wait_s"] for record in since) / max(step_s, 1e-9)
        left_s = (self._last_step - now["step"]) * step_s / len(since)
        images = now["imgs_per_s"] * now["step_s"] * len(since)
        last_scale = [record["loss_per_scale"][-1] for record in since]
        text = (
            f"img {now['samples']:>9,}  loss {_mean([record['loss'] for record in since])}  last {_mean(last_scale)}"
            f"  acc {100 * (now['accuracy'] or 0):5.2f}%  |g| {_show(now['grad_norm'])}  lr {now['lr']:.2e}"
            f"  img/s {images / max(step_s, 1e-9):7.1f}{_mfu(now)}  wait {wait:4.1f}%  mem {now['memory_gib']:5.1f}G"
            f"  eta {duration(left_s)}"
        )
        if now["skipped"]:
            text += f"  SKIPPED{' bad samples ' + str(now['bad_samples'][:4]) if now.get('bad_samples') else ''}"
        return text


def _mfu(record: JsonRecord) -> str:
    return f"  mfu {100 * record['mfu']:4.1f}%" if record.get("mfu") else ""


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _show(sum(known) / len(known) if known else None)


def _show(value: float | None) -> str:
    return "   none" if value is None else f"{value:7.4f}"
