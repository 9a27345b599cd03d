"""The report page in a real browser: it draws, asks for nothing, fits a phone, follows light and dark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mvar.report import main as report
from tests.browser import browser
from tests.unit.reporting.runs import tokenizer_run, transformer_run


def _asked_for(driver: Any, page: str) -> list[str]:
    """URLs of all that a page asked for, beyond what it has in itself. The browser's own pages are not ours."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [one["params"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    urls = [one["request"]["url"] for one in asked if one["documentURL"] == page]
    assert page in urls
    return [url for url in urls if url != page and not url.startswith("data:")]


@pytest.mark.parametrize("make", [transformer_run, tokenizer_run])
def test_the_page_opens_by_itself_and_fits_a_phone(make: Any, tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    with browser(tmp_path, 1200, 900) as driver:
        assert report([str(run), "--html"]) == 0
        url = (run / "report.html").as_uri()
        driver.get(url)
        assert driver.title == "run - mvar report"  # Not what a file's script would make of it.
        drawn = driver.execute_script(
            "return [...document.querySelectorAll('.charts svg')].map(one => one.getBoundingClientRect().height)"
        )
        assert len(drawn) >= 6 and min(drawn) > 100
        images = driver.execute_script("return [...document.images].map(one => one.complete && one.naturalWidth)")
        assert images and all(width == 40 for width in images)
        assert _asked_for(driver, url) == []
        assert [one for one in driver.get_log("browser") if one["level"] == "SEVERE"] == []
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        )
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        papers = []
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            papers.append(driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
        light, dark = (sum(map(int, paper.strip("rgb()").split(","))) for paper in papers)
        assert light > 700 and dark < 120
