"""The pages in a browser: they follow what happens, are used by keyboard, look right, and break no rule of theirs."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from service_fakes import (
    FakeExecution,
    FakeExecutor,
    RunningService,
    hanging,
    make_report,
    make_settings,
    make_trial,
    running_service,
    succeeding,
)

from autobatch.store import NewMeasurement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Browser, ConsoleMessage, Page

    from autobatch_server.execution import Executor, ProbeTask

QUESTION = {"workload": "gpt2", "target": 256, "gpu": "A100-40GB"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: install Debian's package chromium")
playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

# What everyone must be able to use, by rules that a program can tell (WCAG 2.2: 1.1.1, 1.3.1, 1.4.3, 2.4.1, 4.1.2).
RULES = """
() => {
  const found = [];
  const seen = (element) => element.checkVisibility() && !element.closest("[hidden]");
  const wordsOf = (ids) => (ids ?? "").split(" ").map((id) => document.getElementById(id)?.textContent ?? "").join(" ");
  const nameOf = (element) =>
    (element.getAttribute("aria-label") ?? wordsOf(element.getAttribute("aria-labelledby"))).trim() || element.textContent.trim();
  for (const input of document.querySelectorAll("input:not([type=hidden]), select, textarea"))
    if (seen(input) && !input.labels.length && !input.getAttribute("aria-label")) found.push(`no label: ${input.outerHTML}`);
  for (const control of document.querySelectorAll("button, a[href], [role=region], nav, section"))
    if (seen(control) && !nameOf(control)) found.push(`no name: ${control.outerHTML.slice(0, 120)}`);
  for (const image of document.querySelectorAll("img, svg"))
    if (seen(image) && !image.hasAttribute("alt") && !(image.getAttribute("role") === "img" && image.querySelector("title")))
      found.push(`no alternative: ${image.tagName}`);
  for (const table of document.querySelectorAll("table")) {
    if (!table.caption?.textContent.trim()) found.push("a table without a caption");
    for (const head of table.querySelectorAll("th")) if (!head.scope) found.push(`no scope: ${head.textContent}`);
  }
  let level = 0;
  for (const heading of document.querySelectorAll("h1, h2, h3, h4")) {
    const next = Number(heading.tagName[1]);
    if (next > level + 1) found.push(`heading ${next} after ${level}: ${heading.textContent}`);
    level = next;
  }
  if (document.querySelectorAll("h1").length !== 1) found.push("not one h1");
  if (document.querySelectorAll("main").length !== 1) found.push("not one main");
  if (!document.documentElement.lang || !document.title) found.push("no language or title");
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  for (const id of new Set(ids)) if (ids.filter((other) => other === id).length > 1) found.push(`id twice: ${id}`);
  for (const name of ["aria-labelledby", "aria-describedby", "for", "list"])
    for (const id of [...document.querySelectorAll(`[${name}]`)].flatMap((element) => element.getAttribute(name).split(" ")))
      if (id && !document.getElementById(id)) found.push(`refers to nothing: ${id}`);

  const numbers = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number);
  const part = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = ([red, green, blue]) => 0.2126 * part(red) + 0.7152 * part(green) + 0.0722 * part(blue);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = numbers(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return matchMedia("(prefers-color-scheme: dark)").matches ? [0, 0, 0] : [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.nodeValue.trim() || !seen(element)) continue;
    if (element.closest("svg, script, style, noscript, datalist")) continue;
    const [first, second] = [light(numbers(getComputedStyle(element).color)), light(ground(element))].sort((a, b) => b - a);
    const contrast = (first + 0.05) / (second + 0.05);
    if (contrast < 4.5) found.push(`contrast ${contrast.toFixed(2)}: ${walker.currentNode.nodeValue.trim()}`);
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for this file."""
    with playwright_api.sync_playwright() as playwright:
        # No sandbox: tests may run as root, and the pages are our own.
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Executor], RunningService]]:
    """Serve with another executor, until after the page is closed: named before it in each test."""
    with contextlib.ExitStack() as stack:
        yield lambda executor: stack.enter_context(running_service(make_settings(tmp_path), executor=executor))


@pytest.fixture
def complaints() -> list[str]:
    """Everything that the browser complained of; empty at the end of a test that did not empty it itself."""
    return []


@pytest.fixture
def page(browser: Browser, complaints: list[str]) -> Iterator[Page]:
    """A page of 1440 × 900; what it complains of, policies that were broken among it, fails the test."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light")
    page = context.new_page()

    def on_console(message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            complaints.append(message.text)

    page.on("console", on_console)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.set_default_timeout(10_000)
    yield page
    context.close()
    assert complaints == []


@pytest.fixture
def keep_shot(tmp_path: Path) -> Callable[[Page, str], None]:
    """Keep a picture of a page, in the folder that AUTOBATCH_TEST_ARTEFACTS names where it is set."""
    named = os.environ.get("AUTOBATCH_TEST_ARTEFACTS")
    folder = Path(named) if named else tmp_path
    folder.mkdir(parents=True, exist_ok=True)

    def keep(page: Page, name: str) -> None:
        path = folder / f"page-{name}.png"
        page.screenshot(path=path, full_page=True)
        assert path.stat().st_size > 1000

    return keep


@dataclass
class StepwiseExecutor:
    """Runs that say their next message when told to, each with the bracket that a real one tells."""

    steps: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def start(self, task: ProbeTask) -> _StepwiseExecution:
        known = {"largest_fitting": 20, "smallest_failing": 64}
        *events, report = succeeding(task)
        return _StepwiseExecution(
            [{"event": {**message["event"], **known}} for message in events] + [report], self.steps
        )


class _StepwiseExecution(FakeExecution):
    def __init__(self, messages: list[Any], steps: threading.Semaphore) -> None:
        super().__init__(messages=messages, pause=0)
        self._steps = steps

    def next_message(self, seconds: float) -> Any:
        return self.messages.pop(0) if self._steps.acquire(timeout=seconds) else None


def store(service: RunningService, **report: Any) -> str:
    """Store a measurement, and give its id."""
    made = make_report(**report)
    gpu = report.get("gpu", "A100-SXM4-40GB")
    new = NewMeasurement.of(made, workload=report.get("workload", "gpt2"), gpu=gpu, source="reported")
    return service.services.measurements.add(new, token_id=None).id


def wait_until(page: Page, condition: str, argument: object = None) -> None:
    """Look until a condition holds; Playwright's own way would evaluate text in the page, which its policy forbids."""
    until = time.monotonic() + 10
    while not page.evaluate(condition, argument):
        assert time.monotonic() < until, f"not within 10 s: {condition}"
        page.wait_for_timeout(50)


def check_rules(page: Page) -> None:
    assert page.evaluate(RULES) == []


def test_a_probe_started_over_the_api_is_seen_to_run_and_finish_without_reload(
    serve: Callable[[Executor], RunningService], page: Page, keep_shot: Callable[[Page, str], None]
) -> None:
    """The open page shows the size in hand and the bracket, then the plan, and says so to who hears it."""
    executor = StepwiseExecutor()
    service = serve(executor)
    page.goto(service.url)
    page.evaluate("window.sameDocument = true")
    page.locator("#workload").fill("half-typed")
    probe = service.client.post("/v1/probes", json=QUESTION).json()["id"]
    row = page.locator(f"#{probe}")
    running = page.locator("section[aria-labelledby=running]")
    executor.steps.release()
    running.locator(row).get_by_text("trying 37").wait_for()
    assert "20 fits, 64 fails" in row.inner_text()
    assert "emulated" in row.inner_text()
    first_clock = row.locator(".clock").inner_text()
    wait_until(page, "(was) => document.querySelector('.clock')?.textContent !== was", first_clock)
    keep_shot(page, "running-light")
    check_rules(page)
    page.emulate_media(color_scheme="dark")
    keep_shot(page, "running-dark")
    check_rules(page)
    executor.steps.release(2)
    ended = page.locator("section[aria-labelledby=ended]")
    ended.locator(row).get_by_text("32 × 8").wait_for()
    page.locator("section[aria-labelledby=measurements] tbody tr").wait_for()
    wait_until(page, "() => document.getElementById('said').textContent.includes('succeeded, 32 × 8')")
    assert page.locator("#workload").input_value() == "half-typed"
    assert page.evaluate("document.activeElement.id") == "workload"
    assert page.evaluate("window.sameDocument") is True


def test_a_running_probe_is_cancelled_by_keyboard_and_focus_stays_near(
    serve: Callable[[Executor], RunningService], page: Page
) -> None:
    """Tab to the button, Enter: the probe ends, and the focus is on its line, not lost to the top."""
    service = serve(FakeExecutor(hanging))
    probe = service.client.post("/v1/probes", json=QUESTION).json()["id"]
    service.wait_for(probe, "running")
    page.goto(service.url)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == f"cancel-{probe}":
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    service.wait_for(probe, "cancelled", seconds=10)
    page.locator("section[aria-labelledby=ended]").get_by_text("cancelled").wait_for()
    assert page.evaluate("document.activeElement.closest('tr')?.id") == probe
    assert page.url == f"{service.url}/"


def test_focus_and_scroll_stay_while_rows_come_and_go(serve: Callable[[Executor], RunningService], page: Page) -> None:
    """With the focus on a measurement's link far down, probes that come above move neither."""
    service = serve(FakeExecutor(hanging))
    ids = [store(service) for _ in range(20)]
    page.goto(service.url)
    link = page.locator(f"#{ids[5]} a")
    link.focus()
    link.scroll_into_view_if_needed()
    before = link.bounding_box()
    probe = service.client.post("/v1/probes", json=QUESTION | {"gpu": "L4"}).json()["id"]
    page.locator(f"#{probe}").wait_for()
    after = link.bounding_box()
    assert before is not None
    assert after is not None
    assert abs(after["y"] - before["y"]) < 3
    assert page.evaluate("document.activeElement.closest('tr')?.id") == ids[5]


def test_a_search_answers_and_its_button_runs_a_probe(
    service: RunningService, page: Page, keep_shot: Callable[[Page, str], None]
) -> None:
    """Unknown, run a probe, its page follows it to the end; then the same search has the plan."""
    page.goto(service.url)
    page.get_by_label("Workload").fill("gpt2")
    page.get_by_label("Card").fill("A100-40GB")
    page.get_by_label("Target").fill("256")
    page.keyboard.press("Enter")
    page.get_by_text("Unknown").wait_for()
    check_rules(page)
    keep_shot(page, "unknown")
    page.get_by_role("button", name="Run a probe").click()
    page.wait_for_url("**/probes/prb_*")
    page.locator("#live .big").get_by_text("32 × 8").wait_for()
    page.locator("#event-5").get_by_text("succeeded").wait_for()
    check_rules(page)
    keep_shot(page, "probe")
    page.goto(f"{service.url}/?workload=gpt2&gpu=A100-40GB&target=512&world_size=2&split=even")
    assert "32 × 8 on 2 ranks" in page.locator("#found").inner_text()
    check_rules(page)
    keep_shot(page, "fits")


def test_a_measurement_is_drawn_for_the_theme_and_answers_for_a_target(
    service: RunningService, page: Page, keep_shot: Callable[[Page, str], None]
) -> None:
    """One curve is visible, that of the theme; a target that one types gets its plan."""
    trials = [make_trial(4, fits=True), make_trial(20, fits=True)]
    page.goto(f"{service.url}/measurements/{store(service, extra_trials=trials)}")
    for theme, other in (("light", "dark"), ("dark", "light")):
        page.emulate_media(color_scheme=theme)  # type: ignore[arg-type] # one of the two that it takes
        assert page.locator(f".{theme}-only svg").is_visible()
        assert not page.locator(f".{other}-only svg").is_visible()
        check_rules(page)
        keep_shot(page, f"measurement-{theme}")
    page.get_by_role("textbox", name="Target").fill("512")
    page.get_by_label("Split").select_option("balanced")
    page.get_by_role("button", name="Show the plan").click()
    page.locator("#found .big").wait_for()
    assert page.locator("#found .verdict").inner_text() == "Fits"
    assert "512, exact" in page.locator("#found").inner_text()


def test_nothing_is_wider_than_a_telephone(
    serve: Callable[[Executor], RunningService], page: Page, keep_shot: Callable[[Page, str], None]
) -> None:
    """At 360 pixels no page scrolls sideways, and the basis stays in sight."""
    name = "gpt2?seq_len=512&precision=bf16&a_parameter_without_a_place_to_break=1"
    service = serve(FakeExecutor(hanging))
    id_ = store(service, workload=name)
    probe = service.client.post("/v1/probes", json=QUESTION).json()["id"]
    service.client.post("/v1/probes", json=QUESTION | {"gpu": "L4"})
    service.wait_for(probe, "running")
    page.set_viewport_size({"width": 360, "height": 740})
    paths = {
        "overview": "/",
        "found": "/?workload=gpt2&gpu=H100-SXM5-80GB&target=256",
        "probe": f"/probes/{probe}",
        "measurement": f"/measurements/{id_}",
    }
    for what, path in paths.items():
        page.goto(service.url + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path
        assert page.locator(".basis").first.is_visible()
        check_rules(page)
        keep_shot(page, f"narrow-{what}")


def test_signing_in_leads_back_and_out_again(
    service: RunningService, page: Page, complaints: list[str], keep_shot: Callable[[Page, str], None]
) -> None:
    """A form by keyboard alone, a clear line for a wrong token, then the page that was asked for."""
    token = service.services.tokens.create("anna", ["probe:write"], seconds=None)[1]
    asked = f"{service.url}/?workload=gpt2&gpu=L4&target=256"
    page.goto(asked)
    check_rules(page)
    keep_shot(page, "sign-in")
    page.keyboard.type("abt_wrong")
    page.keyboard.press("Enter")
    page.get_by_text("does not hold").wait_for()
    check_rules(page)
    keep_shot(page, "sign-in-wrong")
    page.keyboard.type(token)
    page.keyboard.press("Enter")
    page.wait_for_url(asked)
    page.get_by_text("Signed in as anna").wait_for()
    page.get_by_role("button", name="Sign out").click()
    page.get_by_label("Token").wait_for()
    # Chromium reports each answer of 401 to a navigation; nothing else was complained of.
    assert [text for text in complaints if "401 (Unauthorized)" not in text] == []
    complaints.clear()


def test_an_error_is_a_page(
    service: RunningService, page: Page, complaints: list[str], keep_shot: Callable[[Page, str], None]
) -> None:
    """What is not there is said in words, in the service's own style."""
    page.goto(f"{service.url}/nowhere")
    assert page.get_by_role("heading", level=1).inner_text() == "There is nothing here"
    check_rules(page)
    keep_shot(page, "error")
    assert [text for text in complaints if "404 (Not Found)" not in text] == []
    complaints.clear()


def test_the_page_says_that_the_server_is_away_and_recovers_by_itself(
    service: RunningService, page: Page, complaints: list[str], keep_shot: Callable[[Page, str], None]
) -> None:
    """While no answer comes, what is shown stays, under a notice; with the first answer the notice goes."""
    store(service)
    page.goto(service.url)
    page.route("**/fragments/**", lambda route: route.abort())
    notice = page.locator("#notice")
    notice.get_by_text("The server does not answer.").wait_for()
    assert page.locator("section[aria-labelledby=measurements] tbody tr").count() == 1
    keep_shot(page, "away")
    check_rules(page)
    page.unroute("**/fragments/**")
    page.route("**/fragments/**", lambda route: route.fulfill(status=503))
    notice.get_by_text("cannot reach its database").wait_for()
    page.unroute("**/fragments/**")
    store(service)
    notice.wait_for(state="hidden")
    wait_until(page, "() => document.querySelectorAll('section[aria-labelledby=measurements] tbody tr').length === 2")
    wait_until(page, "() => document.getElementById('said').textContent.includes('The server answers again')")
    assert [text for text in complaints if "Failed to load resource" not in text] == []
    complaints.clear()


def test_a_session_that_ends_is_told_and_nothing_is_asked_any_more(
    service: RunningService, page: Page, complaints: list[str]
) -> None:
    """After a token was made, the open page asks for it rather than failing again and again."""
    page.goto(service.url)
    service.services.tokens.create("anna", ["plan:read"], seconds=None)
    page.get_by_role("link", name="Sign in again").wait_for()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(2500)
    assert asked == []
    assert len([text for text in complaints if "401" in text]) == len(complaints) == 1
    complaints.clear()


@pytest.mark.slow
def test_an_idle_page_asks_less_and_less_and_a_hidden_one_not_at_all(service: RunningService, page: Page) -> None:
    """The pauses grow from one second; while the tab is hidden nothing is asked."""
    page.goto(service.url)
    asked: list[float] = []
    page.on("request", lambda request: asked.append(time.monotonic()) if "/fragments/" in request.url else None)
    page.wait_for_timeout(6000)
    assert len(asked) == 3
    assert asked[2] - asked[1] > 1.2 * (asked[1] - asked[0])
    page.evaluate(
        "Object.defineProperty(document, 'visibilityState', { value: 'hidden' });"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    asked.clear()
    page.wait_for_timeout(4500)
    assert asked == []


def test_the_pages_need_no_network(service: RunningService, page: Page) -> None:
    """Everything that a page asks for comes from the service itself."""
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(request.url.partition("//")[2].partition("/")[0]))
    page.goto(service.url)
    page.goto(f"{service.url}/measurements/{store(service)}")
    assert hosts == {service.url.removeprefix("http://")}
    assert socket.inet_aton(next(iter(hosts)).partition(":")[0])[0] == 127
