"""The page of the gallery, made with Gradio: fields, buttons and what they call. What they do is in the other files.

Nothing is asked of other hosts: no analytics, no share, fonts of the reader's machine, and a policy that forbids the
rest.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from typing import Any, get_args

from mvar.errors import MvarError
from mvar.gallery import show
from mvar.gallery.entries import Exhibit
from mvar.gallery.studio import Growth, Studio
from mvar.gallery.upload import canvas_of, pictures_of
from mvar.gallery.wish import HowFields, Wish, command_line, edit_command_line, edit_wish_of, wish_of
from mvar.sampling.options import DEFAULTS, Guidance

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Before the library is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import gradio as gr

POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; form-action 'self'"
)
FONTS = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
ONE = "model"
"""All drawing waits in this one line."""
Messages = MutableMapping[str, Any]


class OwnHostOnly:
    """Every answer forbids its page to ask other hosts for anything, whatever a library's template says."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Messages, receive: Any, send: Callable[[Messages], Awaitable[None]]) -> None:
        async def sending(message: Messages) -> None:
            if message["type"] == "http.response.start":
                own = (b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        await self._app(scope, receive, sending)


class Gallery:
    """What the buttons of the page call."""

    def __init__(self, studio: Studio, entries: dict[str, Exhibit]) -> None:
        self.studio, self.entries = studio, entries

    @property
    def machine(self) -> list[str]:
        """How `mvar sample` is told of what differs from its defaults."""
        return [] if self.studio.precision == "auto" else ["--precision", self.studio.precision]

    @property
    def brush_px(self) -> int:
        """Of pictures as large as the first model's: an eighth of their side."""
        return max(2, self.studio.open(next(iter(self.entries.values()))).tokenizer.image_size // 8)

    def read(
        self, label: str, classes: str, per_class: float, seed: float, fields: Sequence[Any]
    ) -> tuple[Exhibit, Wish, HowFields]:
        """Raises MvarError."""
        entry, how = self.entries[label], HowFields(*fields)
        ready = self.studio.open(entry)
        return entry, wish_of(classes, per_class, seed, how, ready.num_classes, ready.names), how

    def classes(self, label: str) -> str:
        try:
            ready = self.studio.open(self.entries[label])
        except MvarError as problem:
            return show.error(problem)
        return show.classes(ready.names, ready.num_classes)

    def draw(self, label: str, classes: str, per_class: float, seed: float, *fields: Any) -> Iterator[tuple[str, str]]:
        """What is shown after each scale, and the command; an error is shown instead."""
        try:
            entry, wish, how = self.read(label, classes, per_class, seed, fields)
            names = self.studio.open(entry).names
            command = command_line(entry, wish, how, names, self.machine)
            frames: list[Growth] = []
            for frame in self.studio.frames(entry, wish):
                frames.append(frame)
                yield show.growing(frames, wish, names), command
        except MvarError as problem:
            yield show.error(problem), ""

    def compare(
        self, left: str, right: str, classes: str, per_class: float, seed: float, *fields: Any
    ) -> Iterator[tuple[str, str]]:
        """Two ways side by side, and both commands. `fields`: of the left way, then of the right one."""
        half = len(fields) // 2
        try:
            one = self.read(left, classes, per_class, seed, fields[:half])
            other = self.read(right, classes, per_class, seed, fields[half:])
            names = self.studio.open(one[0]).names
            commands = "\n".join(command_line(*way, names, self.machine) for way in (one, other))
            for frames in self.studio.side_by_side(one[:2], other[:2]):
                yield show.pair(frames, (one[1], other[1]), (f"A: {left}", f"B: {right}"), names), commands
        except MvarError as problem:
            yield show.error(problem), ""

    def edit(
        self, painted: Any, label: str, class_label: str, count: float, seed: float, *fields: Any
    ) -> Iterator[tuple[str, str, str]]:
        """What is shown after each scale, the command, and its files."""
        try:
            entry, how = self.entries[label], HowFields(*fields)
            files = pictures_of(painted)
            ready = self.studio.open(entry)
            wish = edit_wish_of(class_label, count, seed, how, ready.num_classes, ready.names)
            command = edit_command_line(entry, wish, how, ready.num_classes, ready.names, self.machine)
            frames: list[Growth] = []
            for frame in self.studio.edited(entry, canvas_of(*files, ready.tokenizer.image_size), wish):
                frames.append(frame)
                yield show.growing(frames, wish, ready.names), command, show.given(*files)
        except MvarError as problem:
            yield show.error(problem), "", ""

    def curves(self) -> str:
        """Of all runs, as they are now."""
        return "".join(show.curves(run) for run in dict.fromkeys(entry.weights for entry in self.entries.values()))


def build(gallery: Gallery) -> Any:
    """The page, a `gradio.Blocks`. What a click keeps of files is deleted within the hour."""
    labels = list(gallery.entries)
    with gr.Blocks(title="mvar gallery", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# mvar gallery")
        with gr.Tab("Draw"), gr.Row():
            with gr.Column(scale=1):
                entry = gr.Dropdown(labels, value=labels[0], label="checkpoint", elem_id="draw-checkpoint")
                wish = _wish_fields("draw")
                how = _how_fields("draw")
                button = gr.Button("Draw", variant="primary", elem_id="draw-button")
            with gr.Column(scale=2):
                known, sheet = gr.HTML(), gr.HTML(elem_id="draw-sheet")
                command = _command("draw")
        # Documented calls stand in the page before anybody is asked for a password, with all their choices.
        calls: dict[str, Any] = {"api_visibility": "private"}
        one: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": ONE, **calls}
        drawing = {"show_progress": "minimal", **one}
        button.click(gallery.draw, [entry, *wish, *how], [sheet, command], **drawing)
        entry.change(gallery.classes, entry, known, **one)
        with gr.Tab("Compare"):
            with gr.Row():
                both = _wish_fields("compare")
            with gr.Row():
                sides = [_side(side, labels, place) for place, side in enumerate("ab")]
            button = gr.Button("Compare", variant="primary", elem_id="compare-button")
            sheets, commands = gr.HTML(elem_id="compare-sheet"), _command("compare", lines=2)
        (left, left_how), (right, right_how) = sides
        button.click(gallery.compare, [left, right, *both, *left_how, *right_how], [sheets, commands], **drawing)
        with gr.Tab("Edit"), gr.Row():
            with gr.Column(scale=1):
                painted = gr.ImageEditor(
                    label="a picture; paint over what is to be redrawn", type="numpy", image_mode="RGBA",
                    sources=["upload", "clipboard"], layers=False, transforms=[], elem_id="edit-picture",
                    brush=gr.Brush(gallery.brush_px, colors=["#e0457b"], color_mode="fixed"), height=360,
                )  # fmt: skip
                edited = gr.Dropdown(labels, value=labels[0], label="checkpoint", elem_id="edit-checkpoint")
                redraw = [
                    gr.Textbox("", label="class: a number, a name, or nothing", elem_id="edit-class"),
                    gr.Number(4, label="pictures", precision=0, minimum=1, elem_id="edit-count"),
                    gr.Number(0, label="seed", precision=0, elem_id="edit-seed"),
                ]
                how = _how_fields("edit")
                button = gr.Button("Edit", variant="primary", elem_id="edit-button")
            with gr.Column(scale=2):
                sheet, command, files = gr.HTML(elem_id="edit-sheet"), _command("edit"), gr.HTML(elem_id="edit-files")
        button.click(gallery.edit, [painted, edited, *redraw, *how], [sheet, command, files], **drawing)
        with gr.Tab("Curves") as tab:
            curves = gr.HTML(elem_id="curves")
        tab.select(gallery.curves, None, curves, **calls)
        page.load(gallery.classes, entry, known, **one)
    return page


def _wish_fields(name: str) -> list[Any]:
    return [
        gr.Textbox(
            "0", label="classes: numbers, ranges or names", placeholder="0-3,7 or cat", elem_id=f"{name}-classes"
        ),
        gr.Number(4, label="images of each class", precision=0, minimum=1, elem_id=f"{name}-per-class"),
        gr.Number(0, label="seed", precision=0, elem_id=f"{name}-seed"),
    ]


def _how_fields(name: str) -> list[Any]:
    """In the order of HowFields."""
    default = HowFields()
    cfg = gr.Textbox(default.cfg, label="guidance: a number, or one for each scale", elem_id=f"{name}-cfg")
    with gr.Accordion("More options", open=False):
        guidance = gr.Radio(list(get_args(Guidance)), value=default.guidance, label="guidance over the scales")
        cfg_scales = gr.Textbox("", label="guidance at these scales only", placeholder="3-9")
        top_k = gr.Textbox(default.top_k, label="top-k (0: all, 1: greedy)", elem_id=f"{name}-top-k")
        top_p = gr.Textbox(default.top_p, label="top-p (0: all)")
        temperature = gr.Textbox(default.temperature, label="temperature")
        smooth = gr.Checkbox(DEFAULTS.smooth, label="smooth: feed mixtures of code vectors")
    return [cfg, guidance, cfg_scales, top_k, top_p, temperature, smooth]


def _side(side: str, labels: Sequence[str], place: int) -> tuple[Any, list[Any]]:
    with gr.Column():
        entry = gr.Dropdown(
            list(labels), value=labels[min(place, len(labels) - 1)], label=f"checkpoint {side.upper()}",
            elem_id=f"{side}-checkpoint",
        )  # fmt: skip
        return entry, _how_fields(side)


def _command(name: str, lines: int = 1) -> Any:
    return gr.Code(
        language="shell", label="the same by command", lines=lines, wrap_lines=True, interactive=False,
        elem_id=f"{name}-command",
    )  # fmt: skip


def serve(page: Any, host: str, port: int, auth: tuple[str, str] | None) -> Any:
    """Start in threads of its own; gives what `gradio.Blocks.launch` does. Raises OSError where the port is taken."""
    from starlette.middleware import Middleware

    theme = gr.themes.Base(font=FONTS[0], font_mono=FONTS[1])
    return page.queue(max_size=16).launch(
        server_name=host,
        server_port=port,
        auth=auth,
        app_kwargs={"middleware": [Middleware(OwnHostOnly)]},
        prevent_thread_lock=True,
        quiet=True,
        max_file_size="64mb",
        share=False,
        inbrowser=False,
        ssr_mode=False,
        pwa=False,
        show_error=True,
        footer_links=[],
        theme=theme,
        css=show.CSS,
        enable_monitoring=False,
        mcp_server=False,
    )
