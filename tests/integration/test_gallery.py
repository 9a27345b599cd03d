"""`mvar gallery` in a real browser: draw, compare, look at curves, download; and what goes wrong leaves it serving."""

from __future__ import annotations

import base64
import http.client
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from mvar.cli import main as mvar
from mvar.gallery.entries import entries_of
from mvar.gallery.studio import Studio
from mvar.images.arrays import save_png
from mvar.testing.tiny_pairs import PYRAMID, write_pair
from tests.browser import browser, require_browser
from tests.golden import REPOSITORY
from tests.unit.reporting.runs import transformer_run

pytest.importorskip("gradio", reason="Gradio is not installed (make test-gallery installs it beside)")
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Served:
    process: subprocess.Popen[str]
    port: int
    labels: tuple[str, ...]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def rss_mib(self) -> float:
        return float(psutil.Process(self.process.pid).memory_info().rss) / 2**20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], int]:
    """Until it answers."""
    port = free_port()
    command = [sys.executable, "-m", "mvar.cli", "gallery", *arguments, "--device", "cpu", "--port", str(port)]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "GRADIO_TEMP_DIR": str(folder / "gradio")}
    process = subprocess.Popen(command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    began = time.monotonic()
    while time.monotonic() - began < 5 * PATIENCE_S:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        try:
            http.client.HTTPConnection("127.0.0.1", port, timeout=10).request("GET", "/")
            return process, port
        except OSError:
            time.sleep(0.2)
    process.kill()
    raise AssertionError("the gallery does not answer")


def stop(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGINT)
    try:
        return process.wait(PATIENCE_S)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Three models, the first a run with curves; the second shares its tokenizer, the third does not."""
    require_browser()
    folder = tmp_path_factory.mktemp("gallery")
    run, other, strange = folder / "run", folder / "other", folder / "strange"
    transformer_run(run)
    for seed, place in enumerate((run, other, strange)):
        place.mkdir(exist_ok=True)
        write_pair(place, seed=seed)
    tokenizers = [str(place / "tokenizer.safetensors") for place in (run, run, strange)]
    weights = [str(run), str(other / "model.safetensors"), str(strange / "model.safetensors")]
    process, port = start(folder, "--weights", *weights, "--tokenizer", *tokenizers)
    try:
        yield Served(process, port, ("run", weights[1], weights[2]))
        assert stop(process) == 0
    finally:
        process.kill()


class Page:
    """A browser on the gallery."""

    def __init__(self, driver: Any, served: Served) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        self.driver, self.first_s = driver, 0.0
        self.patient = WebDriverWait(driver, PATIENCE_S, poll_frequency=0.02)
        driver.get(served.url)
        self.find("#draw-button")
        self.patient.until(lambda _: "classes 0 to" in self.text("body"))

    def find(self, selector: str) -> Any:
        def shown(driver: Any) -> Any:
            return next((one for one in driver.find_elements("css selector", selector) if one.is_displayed()), None)

        return self.patient.until(shown)

    def text(self, selector: str) -> str:
        found = self.driver.execute_script(
            "return (document.querySelector(arguments[0]) || {}).innerText || ''", selector
        )
        return str(found)

    def sources(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(one => one.src)"
        return list(self.driver.execute_script(script, selector))

    def type(self, field: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        found = self.find(f"#{field} input, #{field} textarea")
        found.send_keys(Keys.CONTROL, "a")
        found.send_keys(text, Keys.TAB)

    def pick(self, field: str, label: str) -> None:
        self.find(f"#{field} input").click()
        options = self.patient.until(lambda driver: driver.find_elements("css selector", "[role=option]"))
        next(one for one in options if one.get_attribute("aria-label") == label).click()

    def tab(self, name: str) -> None:
        tabs = self.driver.find_elements("css selector", "button[role=tab]")
        next(one for one in tabs if one.text == name and one.is_displayed()).click()

    def draw(self, button: str = "draw-button", sheet: str = "draw-sheet", pictures: int = 1) -> list[str]:
        """Click, and wait for the end: sources of the finished sheets. An error that is shown ends it, too.

        `first_s`: from the click until there was something to see.
        """
        self.driver.execute_script("document.querySelector(arguments[0])?.remove()", f"#{sheet} .mvar")
        self.find(f"#{button}").click()
        clicked = time.monotonic()
        self.patient.until(lambda _: self.sources(f"#{sheet} img") or self.text(f"#{sheet} .error"))
        self.first_s = time.monotonic() - clicked
        self.patient.until(
            lambda _: len(self.sources(f"#{sheet} .done img")) == pictures or self.text(f"#{sheet} .error")
        )
        return self.sources(f"#{sheet} .done img")


def paint(canvas: Any) -> bool:
    """A stroke through the middle of what is shown."""
    from selenium.webdriver.common.action_chains import ActionChains

    hand = ActionChains(canvas.parent).move_to_element_with_offset(canvas, -40, 0).click_and_hold()
    for _ in range(8):
        hand = hand.move_by_offset(8, 0)
    hand.release().perform()
    return True


@pytest.fixture(scope="module")
def driver(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One browser for all tests that do not close theirs: on a busy machine it takes a while to start."""
    with browser(tmp_path_factory.mktemp("browser"), 1300, 1000) as chrome:
        yield chrome


@pytest.fixture
def page(driver: Any, served: Served) -> Page:
    return Page(driver, served)


def test_a_picture_grows_scale_by_scale_and_its_download_is_what_the_command_writes(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    page.type("draw-classes", "1-2")
    page.type("draw-seed", "11")
    page.type("draw-cfg", "2.5")
    (source,) = page.draw()
    assert len(page.sources("#draw-sheet .film img")) == len({*page.sources("#draw-sheet .film img")}) == len(PYRAMID)
    page.find("#draw-sheet a.download").click()
    download = tmp_path / "mvar-seed11.png"
    page.patient.until(lambda _: download.is_file())
    command = shlex.split(page.text("#draw-command .cm-content"))
    assert command[:2] == ["mvar", "sample"] and "2.5" in command
    monkeypatch.chdir(tmp_path)
    assert mvar([*command[1:], "--device", "cpu"]) == 0
    written = (tmp_path / "samples.png").read_bytes()
    assert written == base64.b64decode(source.partition(",")[2]) == download.read_bytes()


def test_two_models_and_two_settings_stand_side_by_side(page: Page, served: Served) -> None:
    page.tab("Compare")
    page.pick("b-checkpoint", served.labels[1])
    left, right = page.draw("compare-button", "compare-sheet", 2)
    assert left != right
    page.pick("b-checkpoint", served.labels[0])
    assert len({*page.draw("compare-button", "compare-sheet", 2)}) == 1  # The same seeds and settings.
    page.type("b-cfg", "4")
    again, guided = page.draw("compare-button", "compare-sheet", 2)
    assert again == left and guided != left
    assert len(page.text("#compare-command .cm-content").split("mvar sample")) == 3


def test_what_cannot_be_drawn_is_one_message_and_the_next_click_draws(page: Page, served: Served) -> None:
    page.type("draw-classes", "horse")
    assert page.draw() == [] and "cannot read 'horse'" in page.text("#draw-sheet .error")
    page.type("draw-classes", "0-99")
    assert page.draw() == [] and "not within 0-3" in page.text("#draw-sheet .error")
    page.tab("Compare")
    page.pick("b-checkpoint", served.labels[2])
    assert page.draw("compare-button", "compare-sheet", 2) == []
    assert "different tokenizers" in page.text("#compare-sheet .error")
    page.tab("Draw")
    page.type("draw-classes", "0")
    assert len(page.draw()) == 1


def test_curves_are_shown_with_the_distances_of_samples_and_nothing_is_asked_of_other_hosts(
    page: Page, served: Served
) -> None:
    page.tab("Curves")
    page.patient.until(lambda _: "Frechet distance" in page.text("#curves"))
    assert page.find("#curves svg").size["height"] > 100 and "no run folder" in page.text("#curves")
    messages = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    answered = [one["params"]["response"]["url"] for one in messages if one["method"] == "Network.responseReceived"]
    ours = (served.url, "data:", "blob:", "chrome")
    assert answered and [url for url in answered if not url.startswith(ours)] == []


def test_a_browser_that_goes_away_while_drawing_leaves_the_server_to_others(
    page: Page, served: Served, tmp_path: Path
) -> None:
    with browser(tmp_path / "gone", 1300, 1000) as driver:
        leaving = Page(driver, served)
        leaving.type("draw-classes", "0-3")
        leaving.type("draw-per-class", "16")
        leaving.find("#draw-button").click()
        leaving.patient.until(lambda _: leaving.sources("#draw-sheet img"))
    assert len(page.draw()) == 1 and served.process.poll() is None


def test_ten_clicks_show_something_soon_and_leave_memory_where_it_was(page: Page, served: Served) -> None:
    for seed in range(3):
        page.type("draw-seed", str(seed))
        page.draw()
    before, waited_s = served.rss_mib(), []
    for seed in range(10):
        page.type("draw-seed", str(100 + seed))
        assert len(page.draw()) == 1
        waited_s.append(page.first_s)
    assert statistics.median(waited_s) < 3
    assert served.rss_mib() - before < 16


def test_a_port_in_use_ends_the_second_gallery_with_one_message(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mvar(["gallery", *write_pair(tmp_path), "--port", str(served.port)]) == 2
    assert f"--port {served.port}: cannot be listened on" in capsys.readouterr().err


def test_a_picture_is_painted_on_and_redrawn_there_as_its_command_does_it(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_png(tmp_path / "mine.png", np.random.default_rng(5).integers(0, 256, (16, 16, 3), np.uint8))
    page.tab("Edit")
    page.type("edit-count", "1")
    page.type("edit-class", "1")
    assert page.draw("edit-button", "edit-sheet") == [] and "no picture yet" in page.text("#edit-sheet .error")
    canvas = page.find("#edit-picture canvas")
    time.sleep(2)  # Nothing tells when it takes pictures.
    page.driver.find_element("css selector", "#edit-picture input[type=file]").send_keys(str(tmp_path / "mine.png"))
    time.sleep(2)  # Nor when it shows one.
    paint(canvas)
    (source,) = page.draw("edit-button", "edit-sheet")
    for link in page.driver.find_elements("css selector", "#edit-files a.download"):
        data = link.get_attribute("href").partition(",")[2]
        (tmp_path / link.get_attribute("download")).write_bytes(base64.b64decode(data))
    with Image.open(tmp_path / "mask.png") as mask, Image.open(tmp_path / "picture.png") as picture:
        marked = np.asarray(mask)[..., 0] == 255
        assert mask.size == picture.size == (16, 16) and 0 < marked.mean() < 0.9
    command = shlex.split(page.text("#edit-command .cm-content"))
    assert command[:2] == ["mvar", "edit"]
    monkeypatch.chdir(tmp_path)
    assert mvar([*command[1:], "--device", "cpu"]) == 0
    assert (tmp_path / "edited" / "00000.png").read_bytes() == base64.b64decode(source.partition(",")[2])


def test_a_gallery_with_a_password_shows_nothing_without_it(tmp_path: Path) -> None:
    from mvar.gallery.page import Gallery, build, serve

    _, weights, _, tokenizer = write_pair(tmp_path)
    exhibits = entries_of([Path(weights)], [Path(tokenizer)])
    blocks, port = build(Gallery(Studio(torch.device("cpu")), exhibits)), free_port()

    def ask(method: str, path: str, form: dict[str, str] | None = None, cookie: str = "") -> tuple[int, bytes, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        headers = {"Content-Type": "application/x-www-form-urlencoded", "Cookie": cookie}
        connection.request(method, path, urllib.parse.urlencode(form or {}), headers)
        answer = connection.getresponse()
        cookies = [value.partition(";")[0] for key, value in answer.getheaders() if key.lower() == "set-cookie"]
        return answer.status, answer.read(), "; ".join(cookies)

    serve(blocks, "127.0.0.1", port, ("mvar", "sesame"))
    try:
        assert ask("GET", "/config")[0] == 401 and b"model.safetensors" not in ask("GET", "/")[1]
        assert ask("POST", "/login", {"username": "mvar", "password": "guess"})[0] == 400
        status, _, cookie = ask("POST", "/login", {"username": "mvar", "password": "sesame"})
        assert status == 200 and cookie
        status, body, _ = ask("GET", "/config", cookie=cookie)
        assert status == 200 and b"model.safetensors" in body
    finally:
        blocks.close(verbose=False)
