"""Part by part, what an attacker would try: each rule of the service's security is broken on purpose, and must hold."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import re
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import fastapi.routing
import httpx
import pytest
from service_fakes import FakeExecutor, hanging, make_report, make_settings, make_trial, running_service, succeeding

from autobatch.store import MeasurementStore, NewMeasurement
from autobatch_server import bodies, logs
from autobatch_server.access import COOKIE
from autobatch_server.database import open_database
from autobatch_server.execution import ChildExecutor, ProbeTask
from autobatch_server.guard import Guard
from autobatch_server.questions import LONGEST_PLAN
from autobatch_server.queue import Claim, Order, ProbeQueue, ProbeRecord
from autobatch_server.tokens import SCOPES, TokenStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from service_fakes import RunningService

QUESTION = {"workload": "gpt2", "target": 256, "gpu": "A100-40GB"}
JSON = {"Content-Type": "application/json"}
WRONG = "abt_0123456789abcdef_" + "x" * 43
OPEN_ROUTES = {("GET", "/livez"), ("GET", "/readyz")}
# The page's form takes a token where there is none yet; signing out ends whatever session the cookie names.
SESSION_ROUTES = {("GET", "/login"), ("POST", "/login"), ("POST", "/logout")}


@pytest.fixture(scope="module")
def log() -> Iterator[io.StringIO]:
    """Everything that is logged, as the service writes it."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logs._JsonFormatter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel("INFO")
    yield written
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, log: io.StringIO) -> Iterator[RunningService]:
    """A service without tokens, whose probes succeed within milliseconds."""
    settings = make_settings(tmp_path_factory.mktemp("open"), body_limit_bytes=65536)
    with running_service(settings, executor=FakeExecutor(succeeding)) as running:
        report = make_report(extra_trials=[make_trial(1, fits=True), make_trial(32, fits=True)])
        new = NewMeasurement.of(report, workload="gpt2", gpu="A100-SXM4-40GB", source="reported")
        running.services.measurements.add(new, token_id=None)
        yield running


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory, log: io.StringIO) -> Iterator[RunningService]:
    """A service with tokens, one for each scope."""
    settings = make_settings(tmp_path_factory.mktemp("closed"))
    with running_service(settings, executor=FakeExecutor(succeeding)) as running:
        yield running


@pytest.fixture(scope="module")
def tokens(closed: RunningService) -> Mapping[str, str]:
    """A token of each scope."""
    return {scope: closed.services.tokens.create(scope, [scope], seconds=None)[1] for scope in SCOPES}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def speak(service: RunningService, request: bytes, *, seconds: float = 10.0) -> bytes:
    """Send bytes as they are, and read until the other side closes or falls silent."""
    address = urlsplit(service.url)
    with socket.create_connection((address.hostname, address.port), timeout=seconds) as connection:
        connection.sendall(request)
        return _read_all(connection)


def _read_all(connection: socket.socket) -> bytes:
    answer = b""
    with contextlib.suppress(TimeoutError, ConnectionResetError):
        connection.settimeout(2)
        while piece := connection.recv(65536):
            answer += piece
            head, ended, body = answer.partition(b"\r\n\r\n")
            said = re.search(rb"content-length: (\d+)", head.lower())
            if ended and said and len(body) >= int(said[1]):
                break
    return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


# ---- names ----------------------------------------------------------------------------------------------------------

NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "os:system",
    "path/x.py:f",
    "file:///etc/passwd",
    "http://127.0.0.1:1/x",
    "autobatch_server.child:main",
    "__import__('os').system('id')",
    "gpt2\u200b",
    "\uff47\uff50\uff54\uff12",  # gpt2 in full-width letters
    "gpt2/../gpt2",
    "gpt2;id",
    "$(id)",
    "GPT2" * 100,
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_name_is_a_key_of_the_catalogue_and_nothing_else(opened: RunningService, name: str) -> None:
    """Paths, modules and URLs are unknown workloads, wherever a workload is named; nothing of them is imported or run."""
    asked = [
        opened.client.post("/v1/probes", json=QUESTION | {"workload": name}),
        opened.client.get("/v1/plan", params=QUESTION | {"workload": name}),
        opened.client.post("/v1/placements", json={"workload": name, "target": 8, "candidates": [{"gpu": "L4"}]}),
        opened.client.post("/v1/measurements", json={"oom": {"workload": name, "gpu": "L4", "micro_batch_size": 3}}),
        opened.client.post("/v1/measurements", json={"report": make_report().to_dict(), "workload": name}),
    ]
    assert [response.json()["code"] for response in asked] == ["unknown-workload"] * 5


@pytest.mark.parametrize(
    "workload",
    [
        "gpt2?__class__=1",
        "gpt2?seq_len=__import__('os')",
        "gpt2?seq_len=1e999",
        "gpt2?seq_len=[1]",
        "gpt2?a",
        "gpt2?seq_len=8&seq_len=9",
    ],
)
def test_parameters_are_those_declared(opened: RunningService, workload: str) -> None:
    """Another parameter, another type, a name twice: 422, by the workload's own declaration."""
    response = opened.client.get("/v1/plan", params=QUESTION | {"workload": workload})
    assert response.status_code == 422
    assert response.json()["code"] == "bad-parameter"


@pytest.mark.parametrize("field", ["workload", "gpu"])
@pytest.mark.parametrize("value", ["gpt2\0", "\0", "a\nb", "", "x" * 10_000])
def test_a_name_with_control_characters_or_without_end_is_refused(
    opened: RunningService, field: str, value: str
) -> None:
    """Neither NUL, which PostgreSQL cannot keep, nor ten thousand characters get as far as a query."""
    for response in (
        opened.client.get("/v1/plan", params=QUESTION | {field: value}),
        opened.client.get("/v1/measurements", params={field: value}),
        opened.client.post("/v1/probes", json=QUESTION | {field: value}),
    ):
        assert response.status_code in {400, 422}
        assert response.json()["code"] in {"invalid-request", "malformed-json"}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/measurements/..%2f..%2fetc%2fpasswd",
        "/v1/measurements/../../etc/passwd",
        "/v1/probes/%2e%2e/%2e%2e/etc/passwd",
        "/docs/static/../../../etc/passwd",
        "/docs/static/..%2f..%2f..%2f__init__.py",
        "/docs/static/%2fetc%2fpasswd",
        "/static/..%2f..%2fsettings.py",
        "/static/%2e%2e/settings.py",
        "//etc/passwd",
        "/v1/measurements/mea_" + "0" * 27 + "%00",
        "/v1/probes/prb_" + "0" * 27 + "%0a",
    ],
)
def test_no_path_leads_out_of_the_service(opened: RunningService, path: str) -> None:
    """Sent as it stands over a socket: 404 or 422, and nothing of any file."""
    answer = speak(opened, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert status_of(answer) in {404, 422}
    assert b"root:" not in answer
    assert b"import " not in answer


# ---- Host and Origin ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hosts",
    [
        ["evil.example"],
        ["evil.example:8000"],
        ["localhost.evil.example"],
        ["127.0.0.1.evil.example"],
        ["localhost@evil.example"],
        ["evil.example@localhost"],
        ["localhost:80@evil.example"],
        ["localhost:"],
        ["localhost:port"],
        ["localhost:999999"],
        ["localhost/evil.example"],
        ["[::1]evil.example"],
        ["[::1]:80@evil.example"],
        ["localhost, evil.example"],
        ["localhost."],
        ["0.0.0.0"],  # noqa: S104 - as a name
        ["127.1"],
        ["2130706433"],
        [""],
        [],
        ["localhost", "localhost"],
        ["localhost", "evil.example"],
        ["evil.example", "localhost"],
    ],
    ids=str,
)
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_another_name_is_refused(opened: RunningService, hosts: list[str], version: str) -> None:
    """A page that rebinds its name to this address, and every trick with the header, ends at the guard."""
    lines = "".join(f"Host: {host}\r\n" for host in hosts)
    answer = speak(opened, f"GET /v1/workloads HTTP/{version}\r\n{lines}Connection: close\r\n\r\n".encode())
    assert status_of(answer) in {400, 421}
    assert b"gpt2" not in answer


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]", "[::1]:8000"])
def test_loopback_names_are_taken_with_any_port(opened: RunningService, host: str) -> None:
    """Behind a forwarded port the header names another one."""
    assert opened.client.get("/v1/workloads", headers={"Host": host}).status_code == 200


def test_the_host_decides_on_health_routes_and_errors_too(opened: RunningService) -> None:
    """Nothing at all is told to a page of another name."""
    for path in ("/livez", "/", "/nowhere", "/docs"):
        response = opened.client.get(path, headers={"Host": "evil.example"})
        assert response.status_code == 421
        assert response.json()["code"] == "host-refused"


@pytest.mark.parametrize("target", ["http://evil.example/v1/workloads", "https://localhost/v1/workloads"])
def test_an_absolute_request_line_reaches_no_route(opened: RunningService, target: str) -> None:
    """The service is no proxy; the name in the request line is not one of its addresses."""
    answer = speak(opened, f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert status_of(answer) in {400, 404, 421}
    assert b"gpt2" not in answer


def test_no_answer_is_made_from_the_host_header(opened: RunningService) -> None:
    """A trailing slash is another address, not a redirect to whatever the header says."""
    response = opened.client.get("/v1/workloads/", headers={"Host": "localhost:1"})
    assert response.status_code == 404
    assert "location" not in response.headers


def cross_origins(service: RunningService) -> list[dict[str, str]]:
    port = urlsplit(service.url).port or 0
    return [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": f"http://127.0.0.1:{port + 1}"},
        {"Origin": f"http://localhost:{port}"},
        {"Origin": f"ftp://127.0.0.1:{port}"},
        {"Origin": f"file://127.0.0.1:{port}"},
        {"Origin": f"http://127.0.0.1:{port}@evil.example"},
        {"Origin": f"http://evil.example#127.0.0.1:{port}"},
        {"Origin": f"http://127.0.0.1:{port}/"},
        {"Origin": f"http://127.0.0.1:{port} http://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Origin": f"http://127.0.0.1:{port}"},
    ]


def test_other_sites_cannot_change_anything(opened: RunningService) -> None:
    """POST and DELETE of another origin, of none (`null`), of another port or scheme: 403, and nothing is done."""
    kept = opened.services.measurements.list_newest()[0].id
    before = len(opened.services.queue.list_probes(limit=200))
    for headers in cross_origins(opened):
        for method, path, body in (
            ("POST", "/v1/probes", QUESTION | {"force": True}),
            ("DELETE", f"/v1/measurements/{kept}", None),
            ("POST", "/v1/probes/prb_" + "0" * 27 + "/cancel", None),
            ("POST", "/login", None),
            ("POST", "/logout", None),
        ):
            response = opened.client.request(method, path, json=body, headers=headers)
            assert (response.status_code, response.json()["code"]) == (403, "origin-refused"), (headers, method, path)
    assert opened.services.measurements.get(kept) is not None
    assert len(opened.services.queue.list_probes(limit=200)) == before


def test_two_origins_are_none(opened: RunningService) -> None:
    """One that is ours beside one that is not does not help."""
    own = urlsplit(opened.url).netloc
    lines = f"Host: {own}\r\nOrigin: http://{own}\r\nOrigin: https://evil.example\r\nContent-Length: 0\r\n"
    answer = speak(opened, f"POST /v1/probes HTTP/1.1\r\n{lines}Connection: close\r\n\r\n".encode())
    assert status_of(answer) == 403


def test_the_own_page_may(opened: RunningService) -> None:
    """The same origin, as a browser says it of the service's own page."""
    headers = {"Origin": opened.url, "Sec-Fetch-Site": "same-origin"}
    assert opened.client.post("/v1/probes", json=QUESTION, headers=headers).status_code in {200, 202}


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "text/json", ""]
)
def test_what_a_form_of_another_site_could_send_is_not_read_as_json(opened: RunningService, kind: str) -> None:
    """Such a request needs no preflight; the body is not looked at, whatever it holds."""
    response = opened.client.post("/v1/probes", content=json.dumps(QUESTION), headers={"Content-Type": kind})
    assert response.status_code == 415
    assert response.json()["code"] == "unsupported-media-type"


def test_no_answer_allows_another_origin(opened: RunningService) -> None:
    """No CORS header, also where a preflight asks for one."""
    asking = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for method, path in (
        ("OPTIONS", "/v1/probes"),
        ("GET", "/v1/workloads"),
        ("GET", "/"),
        ("GET", "/nowhere"),
        ("POST", "/v1/probes"),
    ):
        response = opened.client.request(method, path, headers=asking)
        assert not [name for name in response.headers if name.startswith("access-control")], (method, path)


# ---- bodies ---------------------------------------------------------------------------------------------------------


def flood(service: RunningService, head: str, piece: bytes, *, most: int) -> tuple[int, bytes]:
    """Send pieces until the other side has enough; returns how many bytes it took, and its answer."""
    address = urlsplit(service.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(head.encode())
        sent = 0
        with contextlib.suppress(ConnectionError, TimeoutError):
            while sent < most:
                connection.sendall(piece)
                sent += len(piece)
        return sent, _read_all(connection)


@pytest.mark.parametrize("method", ["POST", "DELETE", "GET", "OPTIONS"])
@pytest.mark.parametrize("size", [1, 4096])
def test_a_flood_without_a_length_is_cut_at_the_limit(opened: RunningService, method: str, size: int) -> None:
    """Chunks without end: 413 once the limit is passed, and the connection is closed, so that nothing more is read."""
    lines = "Host: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    head = f"{method} /v1/probes HTTP/1.1\r\n{lines}\r\n"
    chunk = f"{size:x}\r\n".encode() + b" " * size + b"\r\n"
    sent, answer = flood(opened, head, chunk * (65536 // len(chunk)), most=32 * 1024 * 1024)
    assert sent < 32 * 1024 * 1024
    if answer:  # a reset may overtake it
        assert status_of(answer) == 413
        assert b"connection: close" in answer.lower()
    assert opened.client.get("/livez").status_code == 200


def test_a_length_above_the_limit_is_refused_before_anything_is_read(opened: RunningService) -> None:
    """Also one that no integer type holds."""
    for length in ("65537", "9" * 30):
        answer = speak(
            opened, f"POST /v1/probes HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()
        )
        assert status_of(answer) in {400, 413}
        assert b"connection: close" in answer.lower()


@pytest.mark.parametrize(
    "lines",
    [
        "Content-Length: -1\r\n",
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Content-Length: 0x5\r\n",
        "Content-Length: +5\r\n",
        "Content-Length: 5\r\nTransfer-Encoding: gzip\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
        "Transfer-Encoding : chunked\r\n",
    ],
)
def test_lies_about_the_length_are_malformed(opened: RunningService, lines: str) -> None:
    """What two readers could take for two requests is answered once, with 400, and the connection is closed."""
    smuggled = "GET /v1/workloads HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer = speak(opened, f"POST /v1/probes HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n{smuggled}".encode())
    assert status_of(answer) in {400, 501}
    assert b"gpt2" not in answer


def test_a_body_that_comes_too_slowly_is_given_up(opened: RunningService, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then holds a connection for as long as a body may take, and no longer."""
    guard = _guard_of(opened)
    monkeypatch.setattr(guard, "_body_seconds", 0.5)
    address = urlsplit(opened.url)
    started = time.monotonic()
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/probes HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                connection.sendall(b" ")
                time.sleep(0.05)
        answer = _read_all(connection)
    assert time.monotonic() - started < 8
    assert status_of(answer) == 408
    assert b"connection: close" in answer.lower()


def _guard_of(service: RunningService) -> Guard:
    layer: Any = service.app.middleware_stack
    while not isinstance(layer, Guard):
        layer = layer.app
    return layer


@pytest.mark.parametrize(
    "body",
    [
        "[" * 33 + "]" * 33,
        '{"a":' * 33 + "1" + "}" * 33,
        '[{"a":' * 20 + "1" + "}]" * 20,
        "[" * 60_000,
        '{"parameters":' + "[" * 40 + "]" * 40 + "}",
        '"' + "\\" * 12 + '"' + "[" * 33 + "]" * 33,
    ],
    ids=range(6),
)
def test_deep_bodies_are_refused_before_they_are_built(opened: RunningService, body: str) -> None:
    """Arrays, objects, both in turn, closed or not."""
    response = opened.client.post("/v1/probes", content=body, headers=JSON)
    assert response.status_code == 400
    assert response.json()["code"] == "body-too-deep"


@pytest.mark.parametrize(
    ("body", "deep"),
    [
        (b'"' + b"[" * 100 + b'"', False),
        (b'{"a": "' + b'\\"[' * 100 + b'"}', False),
        (b"[" * 32 + b"]" * 32, False),
        (b"[]" * 1000, False),
        (b"]" * 100 + b"[" * 10, False),
        (b"[" * 33 + b"]" * 33, True),
        (b"{[" * 17 + b"]}" * 17, True),
        (b'"\\\\"' + b"[" * 33, True),
        (b'"' + b"[" * 100, False),
    ],
    ids=range(9),
)
def test_depth_counts_brackets_outside_strings(body: bytes, *, deep: bool) -> None:
    """What stands in a string is not counted, however it is escaped."""
    assert bodies.depth_exceeds(body, 32) is deep


@pytest.mark.parametrize(
    "body", [b'\\"' * 500_000, b'"' * 1_000_000, b"[]" * 500_000, b"[" * 1_000_000, b"][" * 500_000, b'"\\' * 500_000]
)
def test_telling_the_depth_takes_no_longer_for_a_hostile_body(body: bytes) -> None:
    """A mebibyte of quotes, escapes or brackets is read in one pass for each level at most."""
    started = time.process_time()
    bodies.depth_exceeds(b"[" * 40 + body, 32)
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize(
    "fragment",
    [
        '"target": 128',
        '"deadline": 1e400',
        '"tolerance": NaN',
        '"deadline": Infinity',
        '"deadline": -Infinity',
        '"multiple_of": ' + "9" * 5000,
        '"multiple_of": 9007199254740992',
        '"parameters": {"seq_len": 123456789012345678901234567890}',
        '"parameters": {"seq_len": 8, "seq_len": 16}',
        '"parameters": {"precision": "\\ud800"}',
        '"parameters": {"precision": "a\\u0000"}',
        '"\\udfff": 1',
    ],
)
def test_a_body_that_readers_could_read_differently_is_refused(opened: RunningService, fragment: str) -> None:
    """Names twice, numbers without end, halves of characters: a proxy or a log would see another request than we."""
    body = json.dumps(QUESTION)[:-1] + ", " + fragment + "}"
    response = opened.client.post("/v1/probes", content=body, headers=JSON)
    assert response.status_code == 400
    assert response.json()["code"] == "malformed-json"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7"])
def test_only_utf_8_is_read(opened: RunningService, encoding: str) -> None:
    """In another encoding the brackets could be hidden from whoever counts them."""
    text = json.dumps(QUESTION, ensure_ascii=False)
    content = text.encode(encoding) if encoding != "utf-7" else text.replace("{", "+AHs-").encode()
    response = opened.client.post(
        "/v1/probes", content=content, headers={"Content-Type": "application/json; charset=utf-16"}
    )
    assert response.status_code == 400
    assert response.json()["code"] == "malformed-json"


@pytest.mark.parametrize("body", ["null", "1", '"x"', "[]", "true", "", "{", "{}{}"])
def test_another_kind_of_json_is_refused(opened: RunningService, body: str) -> None:
    """An object is wanted, and one."""
    response = opened.client.post("/v1/probes", content=body, headers=JSON)
    assert response.status_code in {400, 422}
    assert response.json()["code"] in {"malformed-json", "invalid-request"}


def test_a_body_with_a_query_is_dropped(opened: RunningService) -> None:
    """It changes nothing of the answer, and the next request on the connection is read as such."""
    query = f"/v1/plan?{httpx.QueryParams(QUESTION)}"
    plain = opened.client.get(query)
    for _ in range(2):
        response = opened.client.request("GET", query, content=b'{"target": 1}', headers=JSON)
        assert response.status_code == 200
        assert response.json() == plain.json()


# ---- numbers and sizes ----------------------------------------------------------------------------------------------


def test_integers_beyond_64_bits_are_refused_in_every_parameter(opened: RunningService) -> None:
    """SQLite would raise an OverflowError: each integer of each route has bounds below that."""
    paths = opened.app.openapi()["paths"]
    tried = 0
    for path, methods in paths.items():
        for parameter in methods.get("get", {}).get("parameters", []):
            kinds = [parameter["schema"], *parameter["schema"].get("anyOf", [])]
            if parameter["in"] != "query" or not {"integer", "number"} & {kind.get("type") for kind in kinds}:
                continue
            for value in (2**63, 2**64 + 1, -(2**63) - 1, 10**400, "1e400", "nan"):
                own = path.replace("{probe_id}", "prb_" + "0" * 27)
                response = opened.client.get(own, params={**QUESTION, parameter["name"]: value})
                assert response.status_code == 422, (path, parameter["name"], value)
                tried += 1
    assert tried >= 30
    probe = opened.client.post("/v1/probes", json=QUESTION | {"force": True}).json()["id"]
    for value in ("9" * 30, "-1", "1e3", "0x1"):
        assert opened.client.get(f"/v1/probes/{probe}/events", headers={"Last-Event-ID": value}).status_code == 422


def test_a_page_is_bounded(opened: RunningService) -> None:
    """Neither everything at once, nor from a place that is no id."""
    for path in ("/v1/probes", "/v1/measurements"):
        for query in ("limit=0", "limit=-1", "limit=201", "limit=1000000", "before=1", "before=' OR 1=1 --"):
            assert opened.client.get(f"{path}?{query}").status_code == 422, (path, query)
    assert opened.client.get("/v1/probes?" + "&".join(["state=queued"] * 1000)).status_code == 422


def test_an_answer_is_bounded(opened: RunningService) -> None:
    """A plan of a million micro-batches, alone or several times, is refused rather than listed."""
    target = 32 * 1_000_000
    response = opened.client.get("/v1/plan", params=QUESTION | {"target": target})
    assert response.status_code == 422
    assert response.json()["code"] == "no-plan"
    assert str(LONGEST_PLAN) in response.json()["detail"]
    known = opened.client.post("/v1/probes", json=QUESTION | {"target": target})
    assert known.json().get("code", "no-plan") == "no-plan"
    ranked = opened.client.post(
        "/v1/placements", json={"workload": "gpt2", "target": target, "candidates": [{"gpu": "A100-40GB"}] * 3}
    )
    assert len(ranked.content) < 100_000
    assert {placement["verdict"] for placement in ranked.json()["placements"]} == {"no_plan"}


def test_a_report_cannot_make_the_service_allocate(opened: RunningService) -> None:
    """A trial that says it had 2^50 micro-batches per step is refused before a window of that many is made."""
    form = make_report().to_dict()
    for number in (2**50, 10**8):
        trial = {**form["trials"][0], "micro_batches_per_step": number, "window": []}
        response = opened.client.post("/v1/measurements", json={"report": {**form, "trials": [trial]}})
        assert response.status_code == 422
        assert response.json()["code"] == "invalid-report"


def test_a_report_is_bounded(closed: RunningService, tokens: Mapping[str, str]) -> None:
    """Reports are read by the hundred: one that fills the whole body is refused."""
    form = make_report().to_dict()
    trial = {**form["trials"][0], "note": "x" * 140_000}
    report = {**form, "trials": [trial, *form["trials"][1:]]}
    response = closed.client.post("/v1/measurements", json={"report": report}, headers=bearer(tokens["admin"]))
    assert response.status_code == 422
    assert response.json()["code"] == "invalid-report"


def test_padded_queries_are_not_remembered(opened: RunningService) -> None:
    """Answers are kept by the query's bytes: who pads it cannot fill the memory."""
    plain = f"/v1/plan?{httpx.QueryParams(QUESTION)}"
    opened.client.get(plain)
    kept = len(opened.services.answers._answers)
    for number in range(20):
        assert opened.client.get(f"{plain}&tolerance=0.{'0' * 2000}{number}").status_code == 200
    assert len(opened.services.answers._answers) <= max(kept, 1)


def test_patterns_do_not_hang(opened: RunningService) -> None:
    """Hostile text in whatever a regular expression looks at is answered at once."""
    hostile = ("a" * 500, "_" * 500, " " * 500, "-" * 120 + "!", "mea_" + "0" * 5000, '"' + "!" * 250 + '"' * 5)
    started = time.monotonic()
    for text in hostile:
        opened.client.get("/v1/plan", params=QUESTION | {"gpu": text[:128]})
        opened.client.get("/v1/plan", params=QUESTION | {"workload": text})
        opened.client.get("/v1/measurements", params={"before": text})
        opened.client.get(f"/v1/measurements/{quote(text)}")
        opened.client.post("/v1/probes", json=QUESTION, headers={"Idempotency-Key": text.strip() or "x"})
        opened.client.get("/v1/workloads", headers={"Authorization": "Bearer x" + text.strip()})
        opened.client.get("/livez", headers={"Host": "a" * 5000 + text.strip('!" ')})
    assert time.monotonic() - started < 10


# ---- tokens ---------------------------------------------------------------------------------------------------------


def routes_of(service: RunningService) -> list[tuple[str, str, str | None]]:
    """Every route: method, path, and the scope that its dependencies ask for."""
    every = getattr(fastapi.routing, "iter_route_contexts", list)(service.app.routes)
    return [
        (method, route.path, next(iter(_scopes_of(route.dependant)), None))
        for route in every
        for method in sorted(route.methods)
    ]


def _scopes_of(dependant: Any) -> Iterator[str]:
    if scope := getattr(dependant.call, "required_scope", None):
        yield scope
    for below in dependant.dependencies:
        yield from _scopes_of(below)


def _address(path: str) -> str:
    for name, value in {
        "{probe_id}": "prb_" + "0" * 27,
        "{measurement_id}": "mea_" + "0" * 27,
        "{name}": "swagger-ui.css",
        "{path:path}": "nowhere/at/all",
    }.items():
        path = path.replace(name, value)
    assert "{" not in path, f"say here what stands for the parameter in {path}"
    return path


def test_every_route_asks_for_a_scope(closed: RunningService) -> None:
    """A route that is added without one fails here: only the health routes and the page's sessions are open."""
    without = {(method, path) for method, path, scope in routes_of(closed) if scope is None}
    assert without == OPEN_ROUTES | SESSION_ROUTES


@pytest.mark.parametrize("sent", [None, WRONG, "abt_", "", "x" * 5000, "abt_0123456789abcdef_" + "\u00e9" * 43])
def test_no_route_answers_without_a_token_that_holds(
    closed: RunningService, tokens: Mapping[str, str], sent: str | None
) -> None:
    """401 with WWW-Authenticate on each; the health routes answer."""
    headers = {} if sent is None else {"Authorization": f"Bearer {sent}".strip().encode("latin-1")}
    for method, path, scope in routes_of(closed):
        response = closed.client.request(method, _address(path), headers=headers)
        if path == "/{path:path}":  # what is nowhere is nowhere, whoever asks
            assert response.status_code in {401, 404}
        elif scope is not None:
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"].startswith("Bearer"), (method, path)
        elif (method, path) in OPEN_ROUTES:
            assert response.status_code == 200


def test_a_token_of_too_narrow_a_scope_is_refused_on_every_route(
    closed: RunningService, tokens: Mapping[str, str]
) -> None:
    """403 where the route asks for more than the token has, and never where it has enough."""
    refused = 0
    for method, path, scope in routes_of(closed):
        if scope is None:
            continue
        for held, token in tokens.items():
            response = closed.client.request(method, _address(path), headers=bearer(token))
            enough = SCOPES.index(held) >= SCOPES.index(scope)
            assert (response.status_code != 403) is enough, (method, path, held, response.status_code)
            assert response.status_code != 401
            refused += not enough
    assert refused >= 5


@pytest.mark.parametrize(
    "form", ["Basic {}", "Token {}", "bearer{}", "{}", "Bearer", "Bearer {} {}", "Bearer: {}", 'Bearer "{}"']
)
def test_other_forms_of_the_header_are_no_token(closed: RunningService, tokens: Mapping[str, str], form: str) -> None:
    """Only `Bearer` and the token."""
    headers = {"Authorization": form.replace("{}", tokens["admin"])}
    assert closed.client.get("/v1/workloads", headers=headers).status_code == 401


def test_two_tokens_are_none(closed: RunningService, tokens: Mapping[str, str]) -> None:
    """A proxy before us may have looked at the other header."""
    headers = [("Authorization", f"Bearer {tokens['admin']}"), ("Authorization", f"Bearer {WRONG}")]
    for order in (headers, headers[::-1]):
        assert closed.client.get("/v1/workloads", headers=order).status_code == 401


def test_a_token_counts_in_the_header_alone(closed: RunningService, tokens: Mapping[str, str]) -> None:
    """In the query, a cookie, a body or another header it is nothing: addresses are kept in histories and logs."""
    token = tokens["admin"]
    asked = [
        closed.client.get(
            "/v1/workloads", params={"token": token, "access_token": token, "authorization": f"Bearer {token}"}
        ),
        closed.client.get("/v1/workloads", headers={"X-Api-Key": token, "X-Authorization": f"Bearer {token}"}),
        closed.client.get(
            "/v1/workloads", headers={"Cookie": f"{COOKIE}={token}; token={token}; Authorization=Bearer {token}"}
        ),
        closed.client.get("/v1/workloads", headers={"Proxy-Authorization": f"Bearer {token}"}),
        httpx.get(closed.url.replace("//", f"//x:{token}@") + "/v1/workloads", trust_env=False),
    ]
    assert [response.status_code for response in asked] == [401] * 5


def test_a_revoked_token_holds_no_more_at_once(closed: RunningService) -> None:
    """Revoked by another process, in the database itself: the next request is refused, through every cache."""
    record, token = closed.services.tokens.create("short", ["plan:read"], seconds=None)
    query = f"/v1/plan?{httpx.QueryParams(QUESTION)}"
    for _ in range(3):
        assert closed.client.get(query, headers=bearer(token)).status_code == 200
    with open_database(closed.services.settings.database_url) as second:
        TokenStore(second).revoke(record.id)
    assert closed.client.get(query, headers=bearer(token)).status_code == 401
    assert closed.client.get("/v1/workloads", headers=bearer(token)).status_code == 401


def test_a_session_ends_with_its_token(closed: RunningService) -> None:
    """The cookie opens what the token opened, and nothing once that is revoked."""
    record, _ = closed.services.tokens.create("page", ["plan:read"], seconds=None)
    session_id, _ = closed.services.tokens.open_session(record)
    headers = {"Cookie": f"{COOKIE}={session_id}"}
    assert closed.client.get("/v1/workloads", headers=headers).status_code == 200
    assert closed.client.post("/v1/probes", json=QUESTION, headers=headers).status_code == 403
    with open_database(closed.services.settings.database_url) as second:
        TokenStore(second).revoke(record.id)
    assert closed.client.get("/v1/workloads", headers=headers).status_code == 401


def test_an_expired_token_holds_no_more(closed: RunningService) -> None:
    """Also where it was known and nothing changed since."""
    _, token = closed.services.tokens.create("brief", ["plan:read"], seconds=1.0)
    assert closed.client.get("/v1/workloads", headers=bearer(token)).status_code == 200
    time.sleep(1.1)
    assert closed.client.get("/v1/workloads", headers=bearer(token)).status_code == 401


def test_a_token_revoked_while_it_is_looked_up_is_not_remembered(tmp_path: Path) -> None:
    """The look-up saw it hold; by the time it is done, the database has changed and others have noticed."""
    with running_service(make_settings(tmp_path), executor=FakeExecutor(succeeding)) as service:
        record, token = service.services.tokens.create("raced", ["plan:read"], seconds=None)
        other = service.services.tokens.create("other", ["plan:read"], seconds=None)[1]
        verify = service.services.tokens.verify

        def slow(text: str) -> Any:
            found = verify(text)
            if text == token:
                service.services.tokens.revoke(record.id)
                assert (
                    httpx.get(f"{service.url}/v1/workloads", headers=bearer(other), trust_env=False).status_code == 200
                )
            return found

        service.services.tokens.verify = slow  # type: ignore[method-assign]
        service.client.get("/v1/workloads", headers=bearer(token))
        service.services.tokens.verify = verify  # type: ignore[method-assign]
        assert service.client.get("/v1/workloads", headers=bearer(token)).status_code == 401


def test_the_first_token_closes_an_open_service(tmp_path: Path) -> None:
    """Made by another process while this one answers: the next request needs it."""
    with running_service(make_settings(tmp_path), executor=FakeExecutor(succeeding)) as service:
        assert service.client.get("/v1/workloads").status_code == 200
        with open_database(service.services.settings.database_url) as second:
            record, token = TokenStore(second).create("first", ["plan:read"], seconds=None)
            assert service.client.get("/v1/workloads").status_code == 401
            assert service.client.get("/v1/workloads", headers=bearer(token)).status_code == 200
            TokenStore(second).revoke(record.id)
        assert service.client.get("/v1/workloads").status_code == 401, "revoking the last must not open it again"


def test_another_address_is_refused_without_tokens(tmp_path: Path) -> None:
    """Through the command line: exit 2 and one line that names the way out."""
    url = f"sqlite:///{tmp_path / 's.sqlite3'}"
    done = subprocess.run(  # noqa: PLW1510 - it is to fail
        [sys.executable, "-m", "autobatch", "serve", "--host", "0.0.0.0", "--port", "0", "--database-url", url],  # noqa: S104 - what is to be refused
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "autobatch token create" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_token_has_its_share_of_the_queue_and_of_streams(tmp_path: Path) -> None:
    """429 for the one who has too much; another token goes on."""
    settings = make_settings(tmp_path, queue_limit=50, queue_limit_per_token=2, streams_per_token=1)
    with running_service(settings, executor=FakeExecutor(hanging)) as service:
        greedy, modest = (service.services.tokens.create(name, ["probe:write"], seconds=None)[1] for name in "gm")
        first = service.client.post("/v1/probes", json=QUESTION, headers=bearer(greedy)).json()["id"]
        assert service.client.post("/v1/probes", json=QUESTION, headers=bearer(greedy)).status_code == 202
        refused = service.client.post("/v1/probes", json=QUESTION, headers=bearer(greedy))
        assert (refused.status_code, refused.json()["code"]) == (429, "queue-full")
        assert int(refused.headers["retry-after"]) > 0
        assert service.client.post("/v1/probes", json=QUESTION, headers=bearer(modest)).status_code == 202
        url = f"/v1/probes/{first}/events"
        with service.client.stream("GET", url, headers=bearer(greedy)) as stream:
            assert stream.status_code == 200
            for second in (url, f"/v1/probes/{first}?wait=5"):
                refused = service.client.get(second, headers=bearer(greedy))
                assert (refused.status_code, refused.json()["code"]) == (429, "too-many-streams")
            with service.client.stream("GET", url, headers=bearer(modest)) as other:
                assert other.status_code == 200


# ---- what is told ---------------------------------------------------------------------------------------------------


def test_no_token_is_ever_logged(closed: RunningService, tokens: Mapping[str, str], log: io.StringIO) -> None:
    """Nor one that is sent where it does not belong, in one piece or cut short."""
    token = tokens["admin"]
    secret = token.rpartition("_")[2] if "_" not in token[21:] else token[21:]
    for path in (
        f"/{token}",
        f"/v1/measurements/{token}",
        f"/v1/plan?token={token}",
        f"/x/{token[:-20]}/y",
        f"/{token.upper()}",
    ):
        closed.client.get(path, headers=bearer(token))
    closed.client.get("/v1/workloads", headers={"Authorization": token})
    closed.client.get("/v1/workloads", headers={"Host": token})
    closed.client.post("/v1/probes", json=QUESTION | {"workload": token}, headers=bearer(token))
    closed.client.post("/v1/probes", content=token, headers=bearer(token) | JSON)
    logging.getLogger("autobatch_server").warning("somebody logs %s by mistake", token)
    written = log.getvalue()
    assert "somebody logs abt_... by mistake" in written
    for part in (token, secret, secret[:12], secret.upper()):
        assert part not in written


def test_lines_of_the_log_are_objects_whatever_is_asked(opened: RunningService, log: io.StringIO) -> None:
    """No request can write a line of its own into the log."""
    before = len(log.getvalue())
    opened.client.get("/%0a%7B%22level%22%3A%22INFO%22%2C%22forged%22%3Atrue%7D%0d%0a%e2%80%a8")
    for line in log.getvalue()[before:].strip().splitlines():
        assert "forged" not in json.loads(line)


def test_a_broken_store_is_told_by_an_id_alone(tmp_path: Path, log: io.StringIO) -> None:
    """A route that raises: 500 with the id under which the log has the traceback, and nothing of the inside."""
    with running_service(make_settings(tmp_path), executor=FakeExecutor(succeeding)) as service:

        class Broken(MeasurementStore):
            def series(self, workload: str, gpu: str) -> Any:
                raise RuntimeError("secret of /srv/keys: SELECT * FROM token")

            marks = list_newest = series  # type: ignore[assignment]

        object.__setattr__(service.services, "measurements", Broken(service.services.database))
        for path in (f"/v1/plan?{httpx.QueryParams(QUESTION)}", "/v1/measurements"):
            response = service.client.get(path)
            assert response.status_code == 500
            problem = response.json()
            assert problem["code"] == "internal-error"
            assert problem["request_id"] == response.headers["x-request-id"]
            for word in ("secret", "SELECT", "Traceback", "RuntimeError", "/srv", ".py"):
                assert word not in response.text
            entries = [json.loads(line) for line in log.getvalue().splitlines()]
            own = [entry for entry in entries if entry.get("request_id") == problem["request_id"]]
            assert any("exception" in entry for entry in own)


def test_every_answer_has_the_headers_that_protect(opened: RunningService, log: io.StringIO) -> None:
    """Errors and what is not there included: no sniffing, no framing, no scripts from elsewhere, no keeping, and an id."""
    asked = [
        ("GET", "/livez", {}),
        ("GET", "/v1/workloads", {}),
        ("GET", "/", {}),
        ("GET", "/docs", {}),
        ("GET", "/docs/static/swagger-ui.css", {}),
        ("GET", "/openapi.json", {}),
        ("GET", "/metrics", {}),
        ("GET", "/nowhere", {}),
        ("GET", "/v1/plan", {}),
        ("GET", f"/v1/plan?{httpx.QueryParams(QUESTION)}", {}),
        ("PUT", "/v1/plan", {}),
        ("HEAD", "/v1/plan", {}),
        ("OPTIONS", "/v1/plan", {}),
        ("TRACE", "/v1/plan", {}),
        ("GET", "/livez", {"Host": "evil.example"}),
        ("POST", "/v1/probes", {"Origin": "null"}),
        ("POST", "/v1/probes", {}),
    ]
    ids = set()
    for method, path, headers in asked:
        response = opened.client.request(method, path, headers=headers)
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy, (method, path)
        assert "frame-ancestors 'none'" in policy
        assert "unsafe-eval" not in policy
        assert "script-src 'unsafe-inline'" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert "cache-control" in response.headers
        assert "server" not in response.headers or "uvicorn" in response.headers["server"]
        ids.add(response.headers["x-request-id"])
    assert len(ids) == len(asked)
    until = time.monotonic() + 5  # a line is written once its answer is out
    while not ids <= (logged := {json.loads(line).get("request_id") for line in log.getvalue().splitlines()}):
        assert time.monotonic() < until, ids - logged
        time.sleep(0.01)


@pytest.mark.parametrize("method", ["TRACE", "OPTIONS", "CONNECT", "PUT", "PATCH", "PROPFIND", "FOO"])
def test_other_methods_are_refused_and_echo_nothing(opened: RunningService, method: str) -> None:
    """405 with what is taken; TRACE does not send the request's headers back."""
    answer = speak(
        opened,
        f"{method} /v1/workloads HTTP/1.1\r\nHost: localhost\r\nX-Secret: hidden\r\nConnection: close\r\n\r\n".encode(),
    )
    assert status_of(answer) == 405
    assert b"hidden" not in answer
    assert b"allow: GET" in answer


def test_allow_names_every_method_of_an_address(opened: RunningService) -> None:
    """Also where two routes share it."""
    assert opened.client.put("/v1/measurements/mea_" + "0" * 27).headers["allow"] == "DELETE, GET"
    assert opened.client.delete("/v1/probes").headers["allow"] == "GET, POST"


def test_a_websocket_is_refused(opened: RunningService) -> None:
    """There are none: an upgrade is not taken."""
    lines = (
        "Host: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    )
    answer = speak(opened, f"GET /v1/workloads HTTP/1.1\r\n{lines}\r\n".encode())
    assert status_of(answer) != 101


def test_the_guard_lets_no_websocket_by() -> None:
    """Where uvicorn speaks the protocol, the application is asked: it would pass by the checks of host and origin."""
    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    async def fail(*asked: Any) -> None:
        raise AssertionError("the application was reached")

    guard = Guard(fail, hosts=(), body_limit_bytes=1024, metrics=None)  # type: ignore[arg-type] # nothing is counted
    asyncio.run(guard({"type": "websocket", "path": "/", "headers": []}, fail, send))
    assert said == [{"type": "websocket.close", "code": 1008}]


def test_an_id_that_a_client_makes_up_is_not_taken(opened: RunningService) -> None:
    """The request's id is ours, so that nobody writes into another's lines of the log."""
    response = opened.client.get("/nowhere", headers={"X-Request-Id": "req_forged"})
    assert response.headers["x-request-id"] != "req_forged"
    assert "req_forged" not in response.text


# ---- children -------------------------------------------------------------------------------------------------------


def test_a_child_sees_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the database's address, nor a token, nor any setting or cloud key: only what a job needs."""
    hidden = (
        "DATABASE_URL",
        "AUTOBATCH_TOKEN",
        "AUTOBATCH_SERVER_DATABASE_URL",
        "AUTOBATCH_SERVER_HOST",
        "PGPASSWORD",
        "AWS_SECRET_ACCESS_KEY",
        "HF_TOKEN",
        "SSH_AUTH_SOCK",
        "LD_PRELOAD",
    )
    for name in hidden:
        monkeypatch.setenv(name, "secret-value")
    with open_database(f"sqlite:///{tmp_path / 's.sqlite3'}") as database:
        queue = ProbeQueue(database, lease_seconds=5, max_attempts=1)
        assert queue.count()["queued"] == 0
    record = ProbeRecord(
        id="prb_" + "0" * 27,
        state="running",
        order=Order(workload="gpt2", gpu="L4", basis="emulated", options={}),
        created_at=0.0,
        started_at=0.0,
        ended_at=None,
        attempts=1,
        cancel_requested=False,
        token_id=None,
        measurement_id=None,
        problem=None,
    )
    task = ProbeTask(claim=Claim(record=record, fence=1, owner="o", slot="s"), library_workload="gpt2", options={})
    seen = ChildExecutor(memory_limit_bytes=1 << 30).environment(task)
    assert "PATH" in seen
    assert not set(hidden) & set(seen)
    assert "secret-value" not in seen.values()
    assert [name for name in seen if name.startswith("AUTOBATCH_")] == ["AUTOBATCH_SERVER_PROBE"]
