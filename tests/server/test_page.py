"""The pages for people, as HTML: what they show, what they escape, who may see them, and what they refuse."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
from service_fakes import FakeExecutor, failing, hanging, make_report, make_settings, make_trial, running_service

from autobatch.store import NewMeasurement
from autobatch_server.access import COOKIE
from autobatch_server.pages import budget_lines, certificate, progress_of
from autobatch_server.queue import EventRecord
from autobatch_server.routes.signin import AttemptLimit, safe_path

if TYPE_CHECKING:
    from pathlib import Path

    from service_fakes import RunningService

    from autobatch import Report

QUESTION = {"workload": "gpt2", "target": 256, "gpu": "A100-40GB"}
SEARCH = "/?workload=gpt2&gpu=A100-40GB&target={}"
FORM = {"content-type": "application/x-www-form-urlencoded"}
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


class Elements(HTMLParser):
    """Every start tag of a document with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag in tags]


def keep(service: RunningService, report: Report, gpu: str = "A100-SXM4-40GB", workload: str = "gpt2") -> str:
    """Store a measurement, and give its id."""
    new = NewMeasurement.of(report, workload=workload, gpu=gpu, source="reported")
    return service.services.measurements.add(new, token_id=None).id


@pytest.fixture
def closed(service: RunningService) -> tuple[RunningService, str]:
    """A service with a token, and the token's text; the service's client sends nothing of it."""
    return service, service.services.tokens.create("anna", ["probe:write"], seconds=None)[1]


def test_the_first_page_shows_without_javascript_what_runs_waits_and_ended(tmp_path: Path) -> None:
    """With one slot: one probe runs, one waits, a cancelled one is under Ended; each by name, card and basis."""
    with running_service(make_settings(tmp_path), executor=FakeExecutor(hanging)) as service:
        ids = [
            service.client.post("/v1/probes", json=QUESTION | {"gpu": gpu}).json()["id"] for gpu in ("L4", "T4", "A10")
        ]
        service.wait_for(ids[0], "running")
        service.client.post(f"/v1/probes/{ids[2]}/cancel")
        text = service.client.get("/").text
    for id_, section, following in zip(
        ids, ("running", "queued", "ended"), ("queued", "ended", "measurements"), strict=True
    ):
        part = text[text.index(f'aria-labelledby="{section}"') : text.index(f'aria-labelledby="{following}"')]
        assert f'href="/probes/{id_}"' in part
        assert "emulated" in part
    assert f'action="/probes/{ids[0]}/cancel"' in text
    assert f'action="/probes/{ids[2]}/cancel"' not in text
    assert "<noscript>" in text


def test_a_finished_probe_and_its_measurement_are_shown_with_the_plan(service: RunningService) -> None:
    """The row under Ended leads to the measurement by the plan in short."""
    probe = service.client.post("/v1/probes", json=QUESTION).json()
    ended = service.wait_for(probe["id"], "succeeded")
    text = service.client.get("/").text
    assert f'<a href="/measurements/{ended["measurement"]}">32 × 8</a>' in text
    page = service.client.get(f"/probes/{probe['id']}").text
    assert "32 × 8" in page
    assert [int(number) for number in re.findall(r'id="event-(\d+)"', page)] == [1, 2, 3, 4, 5]


def test_a_failed_probe_says_its_code_and_our_sentence(tmp_path: Path) -> None:
    """Nothing of what the job raised is on the page."""
    with running_service(make_settings(tmp_path), executor=FakeExecutor(failing)) as service:
        probe = service.client.post("/v1/probes", json=QUESTION).json()
        service.wait_for(probe["id"], "failed")
        pages = service.client.get(f"/probes/{probe['id']}").text + service.client.get("/").text
    assert "<code>workload-failed</code>" in pages
    assert "/secret/path" not in pages


def test_a_search_answers_fits_does_not_fit_and_unknown(service: RunningService) -> None:
    """Each verdict from stored trials, with the plan or a button that runs a probe."""
    keep(service, make_report())
    keep(service, make_report(largest=None, gpu="L4"), gpu="L4")
    fits = service.client.get(SEARCH.format("1,024")).text
    assert 'class="verdict fits"' in fits
    assert "32 × 32" in fits
    assert "Run a probe" not in fits
    assert 'class="verdict does_not_fit"' in service.client.get("/?workload=gpt2&gpu=L4&target=256").text
    unknown = service.client.get("/?workload=gpt2&gpu=H100-SXM5-80GB&target=256").text
    assert 'class="verdict unknown"' in unknown
    assert '<form method="post" action="/probes">' in unknown


@pytest.mark.parametrize(
    ("query", "status", "field"),
    [
        ("workload=gpt3&gpu=L4&target=256", 404, "workload"),
        ("workload=gpt2?no=1&gpu=L4&target=256", 422, "workload"),
        ("workload=gpt2&gpu=L5&target=256", 404, "gpu"),
        ("workload=gpt2&gpu=L4&target=many", 422, "target"),
        ("workload=gpt2&gpu=L4&target=", 422, "target"),
        ("workload=gpt2&gpu=L4&target=٣", 422, "target"),
        ("workload=gpt2&gpu=L4&target=256&world_size=0", 422, "world_size"),
        ("workload=gpt2&gpu=L4&target=255&world_size=2", 422, "target"),
        ("workload=gpt2&gpu=L4&target=256&split=odd", 422, "split"),
    ],
)
def test_a_search_that_cannot_be_read_is_told_at_its_field(
    service: RunningService, query: str, status: int, field: str
) -> None:
    """The page stays, with what was typed; the wrong field refers to the sentence that says why."""
    answer = service.client.get(f"/?{query}")
    assert answer.status_code == status
    inputs = Elements(answer.text).all("input", "select")
    wrong = [one["name"] for one in inputs if one.get("aria-invalid") == "true"]
    assert wrong == [field]
    assert 'id="problem" role="alert"' in answer.text
    assert next(one for one in inputs if one["name"] == "workload")["value"]


def test_the_button_runs_a_probe_as_the_api_does(service: RunningService) -> None:
    """The form leads to the probe's page; where a measurement is fresh, to the measurement."""
    form = {"workload": "gpt2", "gpu": "A100-40GB", "target": "256", "world_size": "1", "split": "even"}
    first = service.client.post("/probes", data=form)
    assert first.status_code == 303
    probe_id = first.headers["location"].removeprefix("/probes/")
    ended = service.wait_for(probe_id, "succeeded")
    again = service.client.post("/probes", data=form)
    assert again.headers["location"] == f"/measurements/{ended['measurement']}"
    assert service.client.post("/probes", json=form).status_code == 415
    assert service.client.post("/probes", data=form | {"target": "x"}).status_code == 422


def test_hostile_words_are_text_and_nothing_else(service: RunningService) -> None:
    """Names, versions, warnings and problems from outside make no element and no attribute."""
    report = make_report()
    report = dataclasses.replace(
        report,
        workload=HOSTILE,
        warnings=(HOSTILE,),
        expected_error=HOSTILE,
        not_modelled=(HOSTILE,),
        device=dataclasses.replace(report.device, name=HOSTILE, compute_capability=HOSTILE),
        versions=dataclasses.replace(report.versions, torch=HOSTILE, cuda=HOSTILE),
    )
    id_ = keep(service, report, gpu=HOSTILE, workload=HOSTILE)
    pages = [f"/measurements/{id_}", "/", f"/measurements/{id_}?target={HOSTILE}"]
    pages += [f"/?workload={HOSTILE}&gpu={HOSTILE}&target={HOSTILE}", f"/probes/{HOSTILE}", f"/?before={HOSTILE}"]
    for page in pages:
        answer = service.client.get(page, headers={"accept": "text/html"})
        assert answer.headers["content-type"].startswith("text/html")
        document = Elements(answer.text)
        assert all((script.get("src") or "").startswith("/static/") for script in document.all("script"))
        assert document.all("img") == []
        handlers = [name for _, attributes in document.found for name in attributes if name.startswith("on")]
        assert handlers == []
    assert "&lt;script&gt;alert(1)" in service.client.get(pages[0]).text


def test_every_page_has_a_policy_that_allows_nothing_inline(closed: tuple[RunningService, str]) -> None:
    """Default none, own files only, no inline script, style or handler; the bare pages' one style has the nonce."""
    service, token = closed
    id_ = keep(service, make_report())
    headers = {"authorization": f"Bearer {token}", "accept": "text/html"}
    paths = ["/", f"/measurements/{id_}", "/fragments/probes", "/measurements/x", "/nowhere", "/?before=x"]
    answers = [service.client.get(path, headers=headers) for path in paths] + [service.client.get("/")]
    for answer in answers:
        policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["form-action"] == policy["connect-src"] == "'self'"
        document = Elements(answer.text)
        assert not [attributes for _, attributes in document.found if "style" in attributes]
        for style in document.all("style"):
            assert policy["style-src"] == f"'nonce-{style['nonce']}'"
        outside = [
            link for element in document.all("a", "link", "form") for link in element.values() if link and "//" in link
        ]
        assert [link for link in outside if not link.startswith("data:image/svg+xml,")] == []
    nonces = {re.search("nonce-[^']+", service.client.get("/").headers["content-security-policy"])[0] for _ in range(2)}  # type: ignore[index]
    assert len(nonces) == 2


def test_without_a_session_every_page_is_the_form_and_shows_nothing(closed: tuple[RunningService, str]) -> None:
    """401 with a form that goes back to the page; files and fragments are closed too."""
    service, _ = closed
    id_ = keep(service, make_report())
    for path in ("/", "/?before=", f"/measurements/{id_}?target=512", "/probes/x", "/fragments/probes"):
        answer = service.client.get(path)
        assert answer.status_code == 401
        assert "gpt2" not in answer.text
        fields = {one["name"]: one.get("value") for one in Elements(answer.text).all("input")}
        assert fields["next"] == path
    assert service.client.get("/nowhere", headers={"accept": "text/html"}).status_code == 401
    assert service.client.get("/static/page.css").status_code == 401
    assert service.client.post("/probes", data=QUESTION).status_code == 401
    assert service.client.get("/v1/probes").headers["content-type"] == "application/problem+json"


def test_a_token_opens_a_session_and_signing_out_ends_it(closed: tuple[RunningService, str]) -> None:
    """The cookie is HttpOnly, SameSite=Strict, for every path, and Secure where the browser came by https."""
    service, token = closed
    answer = service.client.post("/login", data={"token": f" {token} ", "next": "/?before="})
    assert answer.status_code == 303
    assert answer.headers["location"] == "/?before="
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= {part.strip() for part in cookie.split(";")}
    assert "Secure" not in cookie
    assert token not in cookie
    page = service.client.get("/")
    assert "Signed in as anna" in page.text
    session = service.client.cookies[COOKIE]
    assert service.client.post("/logout").status_code == 303
    service.client.cookies.set(COOKIE, session, domain="127.0.0.1")
    assert service.client.get("/").status_code == 401
    origin = {"origin": service.url.replace("http:", "https:")}
    secure = service.client.post("/login", data={"token": token}, headers=origin).headers["set-cookie"]
    assert "Secure" in secure


def test_a_wrong_token_is_told_and_too_many_are_refused(closed: tuple[RunningService, str]) -> None:
    """401 with a clear line and no cookie; after some, 429 with the time to wait, for the right one as well."""
    service, token = closed
    service.app.state.sign_in_attempts = AttemptLimit(burst=2, per_second=0.01)
    for wrong in ("", f"{token[:-1]}~"):
        answer = service.client.post("/login", data={"token": wrong, "next": "/x"})
        assert answer.status_code == 401
        assert "does not hold" in answer.text
        assert "set-cookie" not in answer.headers
        assert 'name="next" value="/x"' in answer.text
    limited = service.client.post("/login", data={"token": token})
    assert limited.status_code == 429
    assert 0 < int(limited.headers["retry-after"]) <= 101
    assert "set-cookie" not in limited.headers


def test_attempts_come_back_with_time_and_addresses_do_not_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst, then one in a while; another address has a burst of its own, until all together are too many."""
    now = [1000.0]
    monkeypatch.setattr("autobatch_server.routes.signin.time.monotonic", lambda: now[0])
    limit = AttemptLimit(burst=2, per_second=0.5, burst_of_all=3, per_second_of_all=1.0)
    limit.count("a")
    assert limit.wait_seconds("a") == 0
    limit.count("a")
    assert limit.wait_seconds("a") == 2
    assert limit.wait_seconds("b") == 0
    limit.count("b")
    assert limit.wait_seconds("b") == 1
    now[0] += 2
    assert limit.wait_seconds("a") == 0


@pytest.mark.parametrize(
    "path",
    [
        "//evil.test",
        "/\\evil.test",
        "https://evil.test",
        "evil.test",
        "",
        "/\t/evil.test",
        "/a\r\nX: y",
        "javascript:1",
        "/" * 9,
        "/a\\b",
    ],
)
def test_signing_in_never_leads_to_another_site(closed: tuple[RunningService, str], path: str) -> None:
    """Only a path of this service is gone to; anything else is the first page."""
    service, token = closed
    answer = service.client.post("/login", data={"token": token, "next": path})
    assert answer.headers["location"] == "/"


def test_paths_of_this_service_are_kept() -> None:
    """What the sign-in form puts there itself comes through."""
    assert safe_path("/measurements/mea_1?target=512&split=even") == "/measurements/mea_1?target=512&split=even"
    assert safe_path("/" + "a" * 5000) == "/"


def test_forms_of_other_sites_are_refused(closed: tuple[RunningService, str]) -> None:
    """A form that another site's page sends signs nobody in or out and runs nothing."""
    service, token = closed
    for path in ("/login", "/logout", "/probes"):
        answer = service.client.post(path, data={"token": token}, headers={"origin": "https://evil.test"})
        assert answer.status_code == 403
        assert "set-cookie" not in answer.headers


def test_who_may_only_read_sees_no_button_and_cannot_act(service: RunningService) -> None:
    """Without probe:write neither a probe nor a cancel is offered, and both are answered by a page with 403."""
    service.services.tokens.create("root", ["admin"], seconds=None)
    reader = service.services.tokens.create("reader", ["plan:read"], seconds=None)[1]
    service.client.post("/login", data={"token": reader})
    page = service.client.get("/?workload=gpt2&gpu=L4&target=256").text
    assert "Run a probe" not in page
    assert "needs the scope probe:write" in page
    answer = service.client.post("/probes", data={"workload": "gpt2", "gpu": "L4", "target": "256"})
    assert answer.status_code == 403
    assert answer.headers["content-type"].startswith("text/html")
    assert "probe:write" in answer.text


def test_the_fragment_is_sent_again_only_when_something_changed(tmp_path: Path) -> None:
    """304 under the tag it had; 200 with another tag once a probe came, and once it was cancelled."""
    with running_service(make_settings(tmp_path), executor=FakeExecutor(hanging)) as service:
        first = service.client.get("/fragments/probes")
        tag = first.headers["etag"]
        assert tag in first.text.replace("&#34;", '"')
        assert service.client.get("/fragments/probes", headers={"if-none-match": tag}).status_code == 304
        probe = service.client.post("/v1/probes", json=QUESTION).json()["id"]
        service.wait_for(probe, "running")
        second = service.client.get("/fragments/probes", headers={"if-none-match": tag})
        assert second.status_code == 200
        assert second.headers["etag"] != tag
        assert f'id="{probe}"' in second.text
        assert service.client.post(f"/probes/{probe}/cancel").headers["location"] == f"/probes/{probe}"
        one = f"/fragments/probes/{probe}"
        service.wait_for(probe, "cancelled")
        ended = service.client.get(one)
        assert 'data-busy="ended"' in ended.text
        assert service.client.get(one, headers={"if-none-match": ended.headers["etag"]}).status_code == 304
        late = service.client.post(f"/probes/{probe}/cancel")
        assert late.status_code == 409
        assert "ended as cancelled" in late.text


def test_a_fragment_is_what_the_page_itself_shows(service: RunningService) -> None:
    """What the script puts in place of the page's part is that part."""
    keep(service, make_report())
    page, fragment = service.client.get("/").text, service.client.get("/fragments/probes").text
    part = page[page.index('<div id="state"') :]
    without_clock = re.compile(r'data-now="[\d.]+"')
    assert without_clock.sub("", part).startswith(without_clock.sub("", fragment).strip())


def test_measurements_are_paged_from_the_newest(service: RunningService) -> None:
    """20 on a page; the link leads to the older ones, and its fragment stays on that page."""
    ids = [keep(service, make_report()) for _ in range(21)]
    first = service.client.get("/").text
    assert re.findall(r'<tr role="row" id="(mea_\w+)"', first) == ids[:0:-1]
    older = re.search(r'href="(/\?before=mea_\w+)#measurements" rel="next"', first)
    assert older is not None
    second = service.client.get(older[1]).text
    assert re.findall(r'<tr role="row" id="(mea_\w+)"', second) == ids[:1]
    assert f'data-fragment="/fragments/probes?before={ids[1]}"' in second


def test_a_measurement_has_both_curves_its_trials_and_a_plan_for_another_target(service: RunningService) -> None:
    """Inline SVG without style attributes, one for each theme; the plan typed is arithmetic on stored trials."""
    id_ = keep(service, make_report(extra_trials=[make_trial(4, fits=True), make_trial(20, fits=True)]))
    text = service.client.get(f"/measurements/{id_}").text
    assert text.count("<svg") == 2
    assert text.count('role="img"') == 2
    assert "37 ran and fitted, 38 ran out of memory, with two micro-batches per optimizer step." in text
    assert "about 0.4 %" in text
    trials = text[text.index('aria-labelledby="trials"') : text.index('aria-labelledby="budget"')]
    assert re.findall(r'<th scope="row">(\d+)', trials) == ["4", "20", "37", "38"]
    planned = service.client.get(f"/measurements/{id_}?target=512&world_size=2&split=balanced")
    assert "37 × 4 + 36 × 3 on 2 ranks" in planned.text
    assert service.client.get(f"/measurements/{id_}?target=0").status_code == 422


def test_without_matplotlib_the_measurement_is_a_table(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page says what is missing, and shows the trials all the same."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    id_ = keep(service, make_report())
    answer = service.client.get(f"/measurements/{id_}")
    assert answer.status_code == 200
    assert "needs matplotlib" in answer.text
    assert 'aria-labelledby="trials"' in answer.text


@pytest.mark.parametrize(
    "path", ["/measurements/mea_1", "/probes/prb_1", "/measurements/%00", "/nowhere", "/static/../x"]
)
def test_what_is_not_there_is_a_page_for_a_browser(service: RunningService, path: str) -> None:
    """404 in words, with the request's id and a way back."""
    answer = service.client.get(path, headers={"accept": "text/html,*/*;q=0.8"})
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["x-request-id"] in answer.text
    assert '<a href="/">' in answer.text


def test_programs_get_problem_documents_at_addresses_that_are_not_there(service: RunningService) -> None:
    """The page for browsers takes nothing away from the interface, methods included."""
    html = {"accept": "text/html"}
    for path, headers in (("/nowhere", {}), ("/v1/nowhere", html)):
        answer = service.client.get(path, headers=headers)
        assert answer.status_code == 404
        assert answer.json()["code"] == "not-found"
    assert service.client.get("/v1/placements", headers=html).status_code == 405


def test_a_database_that_is_away_is_a_page_that_tries_again(service: RunningService, tmp_path: Path) -> None:
    """503 in words without any file of the service; back again, the page is there without a restart."""
    path, aside = tmp_path / "server.sqlite3", tmp_path / "aside"
    path.rename(aside)
    try:
        answer = service.client.get("/")
    finally:
        aside.rename(path)
    assert answer.status_code == 503
    assert answer.headers["content-type"].startswith("text/html")
    assert 'http-equiv="refresh"' in answer.text
    assert [
        link["href"] for link in Elements(answer.text).all("link") if not (link["href"] or "").startswith("data:")
    ] == []
    assert service.client.get("/").status_code == 200


def test_the_pages_are_no_part_of_the_interface(service: RunningService) -> None:
    """OpenAPI describes what programs use."""
    paths = service.client.get("/openapi.json").json()["paths"]
    assert [path for path in paths if not path.startswith(("/v1/", "/livez", "/readyz", "/metrics"))] == []


def test_progress_is_that_of_the_last_attempt() -> None:
    """The size in hand, the bracket and the count of trials begin anew when a probe is run again."""
    trial = {"micro_batch_size": 37, "window": [37, 37], "outcome": "fits"}
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("started", {}),
        ("trial_started", {"window": [37, 37], "largest_fitting": None, "smallest_failing": 64}),
        ("trial_ended", {"trial": trial, "largest_fitting": 37, "smallest_failing": 64}),
        ("trial_started", {"window": [36, 37], "confirmation": True, "largest_fitting": 37, "smallest_failing": 64}),
    ]
    events = [EventRecord(number=n, at=0.0, kind=kind, data=data) for n, (kind, data) in enumerate(kinds, 1)]
    progress = progress_of(events)
    assert progress.doing == "confirming 36 then 37"
    assert (progress.largest_fitting, progress.smallest_failing, progress.num_trials) == (37, 64, 1)
    assert progress_of(events[:3]).doing == "37 fits"
    again = EventRecord(number=5, at=0.0, kind="started", data={"attempt": 2})
    assert progress_of([*events, again]).doing == "starting"


def test_the_budget_adds_up_as_it_is_written() -> None:
    """The lines above the budget sum to it, in the whole MiB that are shown."""
    report = make_report(gpu="L4")
    odd = dataclasses.replace(
        report.memory, budget_bytes=20 * 2**30 + 777_777, headroom_bytes=499_999_999, other_tenants_bytes=3_333_333
    )
    lines = budget_lines(dataclasses.replace(report, memory=odd))
    assert sum(line.mebibytes for line in lines[:-1]) == lines[-1].mebibytes == 20 * 1024 + 1


def test_the_certificate_claims_no_more_than_the_trials_show() -> None:
    """Nothing fits, the ceiling was reached, and what is not certified are each said."""
    assert certificate(make_report(largest=None)).startswith("Nothing fits: even 1 ran out of memory")
    assert "nothing larger was tried" in certificate(make_report(target=8, largest=8))
    assert certificate(dataclasses.replace(make_report(), certified=False)).endswith("Not certified.")
