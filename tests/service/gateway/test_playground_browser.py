"""The page at / in a real browser: chromium without a window, driven by playwright.

Each test leaves a screenshot in its tmp_path, for somebody to look at.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import RunningGateway, wait_for

playwright = pytest.importorskip("playwright.sync_api", reason="make test-conformance installs it")
pytestmark = pytest.mark.conformance

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDE, NARROW = {"width": 1200, "height": 760}, {"width": 420, "height": 760}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH (on Debian and Ubuntu: apt install chromium)")
    with playwright.sync_playwright() as driver:
        # Its sandbox wants privileges that a container does not have; the page is ours.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """One visit to the page. hosts: whom the browser asked for anything. complaints: of its console."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.hosts: set[str] = set()
        self.complaints: list[str] = []
        page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda line: self.complaints.append(line.text) if line.type == "error" else None)

    def ask(self, text: str) -> None:
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def expect(self, selector: str) -> Any:
        """Assertions about the last element; they wait until they hold."""
        return playwright.expect(self.page.locator(selector).last)


@pytest.fixture
def visit(browser: Any, running: RunningGateway, tmp_path: Path) -> Iterator[Visit]:
    visited = Visit(browser.new_page(viewport=WIDE))
    visited.page.goto(running.url)
    visited.expect("#model").to_contain_text("small")
    visited.page.fill("#max_completion_tokens", "100")  # this model has a small context
    yield visited
    visited.page.screenshot(path=tmp_path / "playground.png")
    visited.page.close()
    assert visited.hosts == {running.url.removeprefix("http://")}, "nothing from elsewhere"


def test_answer_is_streamed_with_its_figures(visit: Visit, running: RunningGateway) -> None:
    running.reply_with("A first answer, 😀 included.")
    running.worker.gate.clear()
    visit.ask("What is this?")
    visit.expect(".message.user").to_have_text("What is this?")
    playwright.expect(visit.page.locator("#send")).to_be_disabled()
    running.worker.gate.set()
    visit.expect(".assistant .text").to_have_text("A first answer, 😀 included.")
    visit.expect(".assistant .note").to_have_text(
        re.compile(r"stop · first token \d+ ms, [\d.]+ tokens/s · .* generated")
    )
    assert visit.page.locator("#figures").inner_text() in visit.page.locator(".note").inner_text()
    assert visit.complaints == []


def test_parameters_and_the_conversation_reach_the_service(visit: Visit, running: RunningGateway) -> None:
    visit.page.fill("#system", "Be brief.")
    visit.page.fill("#temperature", "0.5")
    visit.page.fill("#seed", "7")
    visit.page.fill("#other", '{"min_p": 0.05}')
    for num_answers, text in enumerate(("one", "two"), 1):
        visit.ask(text)
        playwright.expect(visit.page.locator(".assistant .note")).to_have_count(num_answers)
    request = running.worker.seen[-1]
    assert (request.sampling.temperature, request.sampling.seed, request.sampling.min_p) == (0.5, 7, 0.05)
    prompt = running.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
    assert re.findall(r"<\|im_start\|>(.*?)\n(.*?)<\|im_end\|>", prompt) == [
        ("system", "Be brief."),
        ("user", "one"),
        ("assistant", "one"),
        ("user", "two"),
    ]


def test_stop_ends_the_answer_and_its_generation(visit: Visit, running: RunningGateway) -> None:
    tokens = running.gateway.model.encode("word " * 100)
    running.worker.reply = lambda request: tokens
    running.worker.gate.clear()
    visit.page.fill("#max_completion_tokens", "400")
    visit.ask("Go on.")
    running.worker.gate.set()
    wait_for(lambda: running.gateway.metrics.num_running)
    running.worker.gate.clear()  # it has begun and does not end
    visit.expect(".assistant .text").to_contain_text("w")
    visit.page.click("#stop")
    visit.expect(".assistant .note").to_contain_text("stopped")
    wait_for(lambda: running.worker.seen[-1].request_id in running.worker.dropped)
    assert visit.complaints == []


def test_json_is_shown_laid_out(visit: Visit, running: RunningGateway) -> None:
    running.reply_with('{"city": "Rome", "population": 3}')
    visit.page.select_option("#format", "json_schema")
    visit.ask("Rome?")
    visit.expect("pre.json").to_have_text('{\n  "city": "Rome",\n  "population": 3\n}')
    assert running.worker.seen[-1].grammar is not None
    visit.page.locator("details.raw summary").click()
    visit.expect("details.raw pre").to_contain_text('"object":"chat.completion.chunk"')


def test_calls_are_shown_and_their_results_sent(visit: Visit, running: RunningGateway) -> None:
    running.reply_with('{"name": "weather", "arguments": {"city": "Rome"}}')
    visit.page.fill("#tools", '[{"type": "function", "function": {"name": "weather"}}]')
    visit.ask("Weather?")
    visit.expect("pre.call").to_have_text('weather({\n  "city": "Rome"\n})')
    visit.expect(".assistant .note").to_contain_text("tool_calls")
    running.reply_with("It is sunny.")
    visit.ask("sunny")
    visit.expect(".assistant .text").to_have_text("It is sunny.")
    prompt = running.tokenizer.decode(running.worker.seen[-1].prompt_token_ids)
    assert "Result of weather: sunny" in prompt


def test_refusal_is_shown_and_the_message_kept(visit: Visit) -> None:
    visit.page.fill("#temperature", "9")
    visit.ask("x")
    visit.expect(".message.failed").to_contain_text("temperature")
    assert visit.page.input_value("#prompt") == "x"
    visit.page.fill("#temperature", "1")
    visit.page.press("#prompt", "Enter")
    visit.expect(".assistant .note").to_contain_text("stop")


def test_failure_in_the_middle_is_shown(visit: Visit) -> None:
    visit.ask("fail: too odd")
    visit.expect(".message.failed").to_have_text("fail: too odd")


def test_what_a_model_writes_is_text(visit: Visit, running: RunningGateway) -> None:
    html = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
    running.reply_with(html)
    visit.ask("Attack.")
    visit.expect(".assistant .text").to_have_text(html)
    assert "run" not in visit.page.title()


def test_page_fits_a_telephone(visit: Visit) -> None:
    visit.page.set_viewport_size(NARROW)
    visit.ask("a word")
    visit.expect(".assistant .note").to_be_in_viewport()
    playwright.expect(visit.page.locator("#send")).to_be_in_viewport()
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]


def test_key_is_asked_for(browser: Any, run_gateway: Callable[..., Any]) -> None:
    with run_gateway(api_keys=("nb-secret",)) as running:
        page = browser.new_page(http_credentials={"username": "", "password": "nb-secret"})
        page.goto(running.url)
        playwright.expect(page.locator("#model")).to_contain_text("small")
        page.fill("#key", "wrong")
        page.press("#key", "Tab")
        playwright.expect(page.locator("#model")).to_have_text("the API key is not valid")
        page.close()
