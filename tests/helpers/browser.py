"""A headless Chromium for tests of pages. Skips, naming what is missing, where there is none."""

import contextlib
import shutil
from collections.abc import Iterator

import pytest

FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars")


@contextlib.contextmanager
def browser(width: int = 1366, height: int = 850) -> Iterator:
    """A selenium driver whose page is [width, height] pixels; `console_errors` reads what its pages
    complained of.

    The size is the page's own, so that a phone's (390 wide) is not rounded up to the smallest
    window.
    """
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = (
        shutil.which("chromium")
        or shutil.which("google-chrome")
        or shutil.which("chromium-browser")
    )
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip(f"no {'chromedriver' if chromium else 'chromium'} on the PATH")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(chromedriver))
    try:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        yield driver
    finally:
        driver.quit()


def console_errors(driver) -> list[str]:
    """Since it was last asked."""
    return [line["message"] for line in driver.get_log("browser") if line["level"] == "SEVERE"]
