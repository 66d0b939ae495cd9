"""The page where a person judges, in a browser and against what a browser would not send."""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

for module in ("torch", "httpx2", "starlette", "tenacity", "uvicorn"):
    pytest.importorskip(module)


import httpx2  # noqa: E402

from realgen_jax.realbench import arena  # noqa: E402
from realgen_jax.realbench.results import Results  # noqa: E402
from reward_bridge.judges import make_judge  # noqa: E402
from reward_bridge.judges.human import _wait_or_interrupt  # noqa: E402
from tests.helpers.arena_judges import make, run, settings  # noqa: E402
from tests.helpers.browser import browser, console_errors  # noqa: E402
from tests.helpers.reward_servers import wait_until  # noqa: E402


@contextlib.contextmanager
def page(evaluated: Results, folder: Path, **changed) -> Iterator[SimpleNamespace]:
    """judge_all waits for a person in a thread; `result` has what it returned in the end."""
    said, result = [], []
    thread = threading.Thread(
        target=lambda: result.append(
            arena.judge_all(
                evaluated,
                make_judge("human", settings(**changed)),
                settings(**changed),
                folder,
                seed=0,
                say=said.append,
            )
        )
    )
    thread.start()
    try:
        wait_until(lambda: said)
        url = said[0].split()[2]
        yield SimpleNamespace(url=url, said=said, result=result, thread=thread)
    finally:
        with contextlib.suppress(httpx2.HTTPError):
            httpx2.post(f"{url}finish", json={})
        thread.join(20)
        assert not thread.is_alive()


def clicks(folder: Path) -> list[str]:
    file = folder / "human" / "human.jsonl"
    return [json.loads(line)["verdict"] for line in file.read_text().splitlines()]


def test_a_person_judges_by_clicks_and_keys_and_goes_on_later(tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    evaluated = make(tmp_path / "pictures", lines=5)

    def ready(driver):
        return driver.execute_script("return ready || pair === null")

    with browser(1280, 800) as driver:

        def press(key):
            wait_until(lambda: ready(driver))
            driver.find_element(By.TAG_NAME, "body").send_keys(key)

        def count(text):
            wait_until(lambda: driver.find_element(By.ID, "count").text == text and ready(driver))

        with page(evaluated, tmp_path) as served:
            driver.get(served.url)
            count("0 of 5")
            assert driver.execute_script(
                "return [...document.images].every(i => i.naturalWidth === 16)"
            )
            assert "a prompt, number" in driver.find_element(By.ID, "prompt").text
            html = driver.page_source
            assert not any(
                word in html
                for word in ("base", "tuned", str(tmp_path), evaluated.pictures[0].sha256)
            )
            driver.find_element(By.ID, "left").click()
            count("1 of 5")
            press(Keys.ARROW_RIGHT)
            count("2 of 5")
            press(Keys.ARROW_DOWN)
            count("3 of 5")
            assert clicks(tmp_path) == ["first", "second", "tie"]
            press(Keys.BACK_SPACE)
            count("2 of 5")
            driver.find_element(By.ID, "choose-left").click()
            count("3 of 5")
            assert clicks(tmp_path) == ["first", "second", "tie", "undone", "first"]
            driver.find_element(By.ID, "finish").click()
            served.thread.join(10)
            (judgements,) = served.result
        assert [j.verdict for j in judgements] == ["first", "second", "first"]
        assert "judged 3 of 5 pairs; run the same command again" in served.said[-1]
        with page(evaluated, tmp_path) as served:
            driver.get(served.url)
            count("3 of 5")
            press(Keys.ARROW_LEFT)
            count("4 of 5")
            press(Keys.ARROW_LEFT)
            count("5 of 5")
            assert "All pairs are judged" in driver.find_element(By.ID, "message").text
            press(Keys.BACK_SPACE)
            count("4 of 5")
            press(Keys.ARROW_DOWN)
            count("5 of 5")
            driver.find_element(By.ID, "finish").click()
            served.thread.join(10)
            (judgements,) = served.result
            wait_until(lambda: "Finished" in driver.find_element(By.ID, "message").text)
        assert [j.verdict for j in judgements] == ["first", "second", "first", "first", "tie"]
        assert not console_errors(driver)
    again, said = run(evaluated, tmp_path, "human", seed=7)  # shown in another order, if at all
    assert {str(j) for j in again} == {str(j) for j in judgements}
    assert not said


def test_the_page_reads_on_a_phone(tmp_path):
    from selenium.webdriver.common.by import By

    with (
        browser(390, 844) as driver,
        page(make(tmp_path / "pictures", size=64), tmp_path) as served,
    ):
        driver.get(served.url)
        wait_until(lambda: driver.execute_script("return ready"))
        size = driver.execute_script(
            "const d = document.documentElement; return [d.scrollWidth, d.scrollHeight]"
        )
        assert size == [390, 844]  # nothing to scroll
        boxes = [
            driver.find_element(By.ID, name).rect
            for name in ("left", "right", "choose-tie", "finish")
        ]
        assert all(box["width"] > 40 and box["height"] > 25 and box["x"] >= 0 for box in boxes)
        assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]  # one above the other
        assert boxes[0]["height"] > 200
        driver.find_element(By.ID, "right").click()
        wait_until(lambda: driver.find_element(By.ID, "count").text == "1 of 3")
        assert not console_errors(driver)


def test_the_page_is_closed_to_other_sites_and_bad_requests(tmp_path):
    evaluated = make(tmp_path / "pictures")
    with page(evaluated, tmp_path) as served:
        root = served.url.rsplit("/", 2)[0]
        assert (
            httpx2.get(served.url)
            .headers["Content-Security-Policy"]
            .startswith("default-src 'none'")
        )
        assert httpx2.get(served.url, headers={"Host": "evil.example"}).status_code == 400
        vote = {"pair": 0, "verdict": "first"}
        assert httpx2.post(f"{root}/verdict", json=vote).status_code == 404
        assert httpx2.post(f"{root}/guess/verdict", json=vote).status_code == 404
        assert (
            httpx2.post(
                f"{served.url}verdict", json=vote, headers={"Host": "evil.example"}
            ).status_code
            == 400
        )
        assert httpx2.get(f"{served.url}verdict").status_code == 405
        for wrong in (b"", b"[]", b'{"verdict": "best", "pair": 0}'):
            assert httpx2.post(f"{served.url}verdict", content=wrong).status_code == 400
        assert httpx2.get(f"{served.url}picture/99/left").status_code == 404
        assert httpx2.get(f"{served.url}picture/0/..%2f..").status_code == 404
        for _ in range(2):  # the second click on a pair is none
            assert httpx2.post(f"{served.url}verdict", json=vote).json()["done"] == 1
        for unknown in (0, 99, "1", None, [1]):
            assert (
                httpx2.post(
                    f"{served.url}verdict", json={"pair": unknown, "verdict": "tie"}
                ).json()["done"]
                == 1
            )
        assert clicks(tmp_path) == ["first"]


def test_a_picture_that_cannot_be_shown_is_left_out(tmp_path):
    evaluated = make(tmp_path / "pictures")
    with page(evaluated, tmp_path) as served:
        first = httpx2.get(f"{served.url}pair").json()["pair"]
        line = int(httpx2.get(f"{served.url}pair").json()["prompt"][-1])
        (tmp_path / "pictures" / f"base_{line}.png").unlink()
        sides = [
            httpx2.get(f"{served.url}picture/{first}/{side}").status_code
            for side in ("left", "right")
        ]
        assert sorted(sides) == [200, 410]
        assert httpx2.get(f"{served.url}pair").json()["pair"] != first
    assert any(f"base_{line}.png" in text and "left out" in text for text in served.said)


def test_ctrl_c_ends_the_session_only():
    before = signal.getsignal(signal.SIGINT)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert not _wait_or_interrupt(threading.Event())
    assert signal.getsignal(signal.SIGINT) is before
    finished = threading.Event()
    finished.set()
    assert _wait_or_interrupt(finished)
