"""The page `/` in a real browser, and its screenshot for the documentation."""

import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
from serving import TOKEN, Client, serving
from test_written_before import COLOUR, SAME, WRITTEN

pytestmark = pytest.mark.slow
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
PAIR = next(iter(SAME))


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving() as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, client: Client) -> Iterator[Any]:
    """The page; its scripts say nothing to the console and ask nobody but the server."""
    context = browser.new_context(viewport={"width": 1000, "height": 900})
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda x: x.url.startswith(client.url) or complaints.append(x.url))
    page.goto(client.url)
    page.wait_for_selector("#tasks th")
    yield page
    context.close()
    # A response with an error status is reported to the console by the browser itself.
    assert [x for x in complaints if "Failed to load resource" not in x] == []


def bars(page: Any) -> dict[str, dict[str, str]]:
    """What the page shows: for each task, each label and its share."""
    page.wait_for_selector("#said:has-text('ms')")
    return {
        card.query_selector("h3").inner_text(): {
            row.query_selector("dt").inner_text(): row.query_selector("dd").inner_text()
            for row in card.query_selector_all("dl > div")
        }
        for card in page.query_selector_all("#answers > li")
    }


def test_a_text_is_answered_while_it_is_typed(page):
    text, (label, probability) = next(iter(COLOUR.items()))
    page.get_by_label("Text", exact=True).fill(text)  # and no button is pressed
    assert bars(page)["colour"][label] == f"{100 * probability:.1f} %"
    best = page.locator(".best")
    assert best.locator("dt").inner_text() == label
    width = best.locator(".bar").evaluate("x => x.offsetWidth / x.parentElement.offsetWidth")
    assert width == pytest.approx(probability, abs=0.02)


def test_a_pair_is_answered_by_every_task_on_pairs(page, client):
    page.get_by_label("Text", exact=True).fill(PAIR[0])
    page.get_by_label("Second text").fill(PAIR[1])
    page.get_by_role("button", name="Answer").click()
    page.wait_for_selector("#answers > li:nth-child(2)")
    same, share = client.predict(text=list(PAIR), task="all").body["answers"][0]
    shown = bars(page)
    assert shown["same"] == {k: f"{100 * p:.1f} %" for k, p in same["probabilities"].items()}
    assert list(shown["share"].values()) == [f"{share['value']:.2f}"]
    assert "2 tasks" in page.locator("#said").inner_text()


def test_a_task_is_removed_and_added(page):
    def answer_late(route: Any) -> None:
        time.sleep(0.2)
        route.continue_()

    page.route("**/v1/tasks", answer_late)
    names = page.locator("#tasks th")
    assert names.all_inner_texts() == ["colour", "same", "share"]
    page.get_by_label("Administrator's token").fill("wrong")
    page.get_by_role("button", name="Remove same").click()
    page.wait_for_selector('#done.bad:has-text("administrator\'s token")')
    page.get_by_label("Administrator's token").fill(TOKEN)
    page.get_by_role("button", name="Remove same").click()
    page.wait_for_selector("#done:has-text('same is removed')")
    assert names.all_inner_texts() == ["colour", "share"]
    page.get_by_label("Task file").set_input_files(WRITTEN / "same.task")
    page.get_by_role("button", name="Add the task").click()
    page.wait_for_selector("#done:has-text('same.task is added')")
    assert names.all_inner_texts() == ["colour", "share", "same"]
    assert "3 of at most 4" in page.locator("#count").inner_text()


def test_nothing_typed_is_ever_markup(page):
    page.get_by_label("Text", exact=True).fill("<img src=x onerror=alert(1)>")
    page.wait_for_selector("#answers > li")
    assert page.locator("#answers img").count() == 0


def test_errors_are_said(page, client):
    page.get_by_label("Text", exact=True).fill("red " * 300_000)
    page.wait_for_selector("#said.bad:has-text('larger than')")
    assert page.locator("#answers > li").count() == 0


def test_everything_has_a_name_and_can_be_reached_by_keyboard(page, client):
    """What a screen reader is told, in the order of the tab key."""
    page.locator("body").click(position={"x": 1, "y": 1})
    page.evaluate("document.activeElement.blur()")
    name = (
        "(x => x.getAttribute('aria-label') || (x.labels?.[0] || x).textContent.trim())"
        "(document.activeElement)"
    )
    reached = []
    for _ in range(10):
        page.keyboard.press("Tab")
        reached.append(" ".join(page.evaluate(name).split()))
    assert reached == [
        *("HTTP interface", "Text", "Second text for tasks on pairs", "Answer"),
        *(f"Remove {task['name']}" for task in client.ask("GET", "/v1/tasks").body["tasks"]),
        *("Task file", "Administrator's token", "Add the task"),
    ]
    assert page.locator("html").get_attribute("lang") == "en"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, textarea, button')].filter((x) =>"
        " !x.labels?.length && !x.textContent.trim() && !x.getAttribute('aria-label')).length"
    )
    assert unnamed == 0


def test_the_documentation_works_without_the_internet(page, client):
    page.goto(f"{client.url}/docs")
    page.wait_for_selector("text=Answers texts or pairs")
