"""A real headless browser for tests: Chromium and its driver as Debian packages them; nothing is downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # Root has no other way.
    "--disable-gpu",
    "--enable-unsafe-swiftshader",  # WebGL without a GPU, for pages that are painted on.
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
)


def require_browser() -> tuple[str, str]:
    """Paths of Chromium and its driver; skips the test, with the reason, where they or selenium are missing."""
    pytest.importorskip("selenium", reason="selenium is not installed (requirements-dev.txt)")
    found = shutil.which("chromium"), shutil.which("chromedriver")
    if found[0] is None or found[1] is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium chromium-driver)")
    return found[0], found[1]


@contextmanager
def browser(profile: Path, width_px: int = 1200, height_px: int = 900) -> Iterator[Any]:
    """A selenium driver with an empty profile; downloads go to `profile / "downloads"`."""
    binary, driver = require_browser()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    downloads = profile / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile / 'profile'}", f"--window-size={width_px},{height_px}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    environ = {**os.environ, "SE_OFFLINE": "true", "SE_AVOID_STATS": "true"}
    chrome = webdriver.Chrome(options=options, service=Service(driver, env=environ))
    try:
        yield chrome
    finally:
        chrome.quit()
