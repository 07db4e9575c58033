"""The app refuses requests that break a rule; no worker is needed, because nothing reaches it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra app is not installed: pip install starlette uvicorn httpx")
pytest.importorskip("httpx", reason="Starlette's test client needs httpx: pip install httpx")

from starlette.testclient import TestClient

from esegeta_monai.app.questions import Question, call_text, refuse_paths
from esegeta_monai.app.security import HEADERS, is_loopback
from esegeta_monai.app.server import App
from esegeta_monai.errors import UsageError

HOST = "127.0.0.1:8765"
SITE = {"host": HOST, "origin": f"http://{HOST}"}


@pytest.fixture
def app(tmp_path: Path) -> Iterator[App]:
    """An app whose worker is never started; its bundle seems to be open."""
    app = App(["false"], {}, tmp_path)
    app.worker.opened = {"bundle": "b", "classes": {"0": "<b>", "1": "liver"}, "cases": ["a"]}
    yield app
    app.close()


@pytest.fixture
def client(app: App) -> TestClient:
    """A browser that has exchanged the token."""
    client = TestClient(app.asgi, base_url=f"http://{HOST}", follow_redirects=False)
    answer = client.get(f"/start?token={app.session.token or 'used'}")
    assert answer.status_code == 303
    return client


def test_the_token_works_once_and_its_cookie_is_for_this_site(app: App) -> None:
    token = app.session.token
    client = TestClient(app.asgi, base_url=f"http://{HOST}", follow_redirects=False)
    assert client.get("/").status_code == 403
    assert client.get("/start?token=guess").status_code == 403
    answer = client.get(f"/start?token={token}")
    cookie = answer.headers["set-cookie"]
    assert answer.status_code == 303
    assert answer.headers["location"] == "/"
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert client.get("/").status_code == 200
    other = TestClient(app.asgi, base_url=f"http://{HOST}", follow_redirects=False)
    assert other.get(f"/start?token={token}").status_code == 403
    assert other.get("/").status_code == 403


REFUSED: dict[str, tuple[str, str, dict[str, Any], int]] = {
    # name: method, path, headers (and content), status
    "traversal": ("GET", "/files/../../etc/passwd", {}, 404),
    "encoded traversal": ("GET", "/files/%2e%2e%2f%2e%2e%2fetc%2fpasswd", {}, 404),
    "double encoded traversal": ("GET", "/files/%252e%252e%252fetc%252fpasswd", {}, 404),
    "backslashes": ("GET", "/files/..%5c..%5cetc%5cpasswd", {}, 404),
    "absolute path": ("GET", "/files//etc/passwd", {}, 404),
    "a null byte": ("GET", "/files/x%00.html", {}, 404),
    "a file of no id": ("GET", "/files/run.json", {}, 404),
    "a volume of no view": ("GET", "/api/views/guess/v0", {}, 400),
    "a volume by a path": ("GET", "/api/views/guess/..%2f..%2fetc%2fpasswd", {}, 404),
    "a case that is not listed": ("POST", "/api/cases/7/view", {"json": {}}, 404),
    "a case by a name": ("POST", "/api/cases/a/view", {"json": {}}, 404),
    "a static folder": ("GET", "/static/app.js", {}, 404),
    "a foreign host": ("GET", "/", {"host": "evil.example"}, 421),
    "a host that begins like ours": ("GET", "/", {"host": "127.0.0.1.evil.example:8765"}, 421),
    "a host that ends like ours": ("GET", "/", {"host": "evil-localhost"}, 421),
    "a host with a user": ("GET", "/", {"host": "127.0.0.1@evil.example"}, 421),
    "an address of the network": ("GET", "/", {"host": "192.168.0.2:8765"}, 421),
    "all addresses": ("GET", "/", {"host": "0.0.0.0:8765"}, 421),
    "no host": ("GET", "/", {"host": ""}, 421),
    "a foreign origin": ("POST", "/api/jobs", {"origin": "http://evil.example", "json": {"do": "report"}}, 403),
    "a foreign origin that reads": ("GET", "/api/state", {"origin": "http://evil.example"}, 403),
    "another port as origin": ("POST", "/api/jobs", {"origin": "http://127.0.0.1:9", "json": {"do": "report"}}, 403),
    "an origin that begins like ours": ("GET", "/", {"origin": f"http://{HOST}.evil.example"}, 403),
    "the origin null": ("POST", "/api/jobs", {"origin": "null", "json": {"do": "report"}}, 403),
    "no origin": ("POST", "/api/jobs", {"origin": None, "json": {"do": "report"}}, 403),
    "made by another site": ("GET", "/", {"sec-fetch-site": "cross-site"}, 403),
    "made by another port": ("GET", "/", {"sec-fetch-site": "same-site"}, 403),
    "no cookie": ("GET", "/", {"cookie": ""}, 403),
    "a guessed cookie": ("GET", "/api/state", {"cookie": "esegeta_00000000=guess"}, 403),
    "a broken cookie": ("GET", "/", {"cookie": '=;;"'}, 403),
    "PUT": ("PUT", "/api/jobs", {}, 405),
    "DELETE": ("DELETE", "/api/jobs", {}, 405),
    "OPTIONS": ("OPTIONS", "/api/jobs", {}, 405),
    "TRACE": ("TRACE", "/", {}, 405),
    "CONNECT": ("CONNECT", "/", {}, 405),
    "a job by GET": ("GET", "/api/jobs", {}, 405),
    "the page by POST": ("POST", "/", {"json": {}}, 405),
    "the token by POST": ("POST", "/start", {"json": {}}, 405),
    "a form": ("POST", "/api/jobs", {"data": {"do": "report"}}, 415),
    "plain text": ("POST", "/api/jobs", {"content": b'{"do": "report"}', "content-type": "text/plain"}, 415),
    "a long body": ("POST", "/api/jobs", {"json": {"x": "x" * 70_000}}, 413),
    "no JSON": ("POST", "/api/jobs", {"content": b"{", "content-type": "application/json"}, 400),
    "a list": ("POST", "/api/jobs", {"json": []}, 400),
    "layers of no case": ("POST", "/api/layers", {"json": {"case": 7}}, 404),
    "layers of a case by name": ("POST", "/api/layers", {"json": {"case": "../a"}}, 404),
    "channels of no view": ("POST", "/api/channels", {"json": {"view": "x", "voxel": [0, 0, 0], "layer": 0}}, 400),
    "channels of a layer by name": ("POST", "/api/channels", {"json": {"view": None, "layer": "/etc/passwd"}}, 400),
    "an unknown job": ("POST", "/api/jobs", {"json": {"do": "os.system"}}, 400),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses(client: TestClient, app: App, name: str) -> None:
    method, path, given, status = REFUSED[name]
    body = {key: given[key] for key in ("json", "data", "content") if key in given}
    headers = {**SITE, **{k: v for k, v in given.items() if k not in body}}
    kept = {key: value for key, value in headers.items() if value is not None}
    if "cookie" in kept:
        client.cookies.clear()
    answer = client.request(method, path, headers=kept, **body)
    assert answer.status_code == status, answer.text
    assert "root:" not in answer.text
    assert not app.worker.jobs, "nothing has reached the worker"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_the_same_requests_pass_without_the_fault(client: TestClient, app: App) -> None:
    """Otherwise the refusals above would show nothing."""
    assert client.get("/", headers=SITE).status_code == 200
    assert client.get("/api/state", headers={"host": "localhost:1", "sec-fetch-site": "same-origin"}).status_code == 200
    answer = client.post("/api/jobs", headers=SITE, json={"do": "report"})
    assert answer.status_code == 200
    assert [job.request for job in app.worker.jobs.values()] == [{"do": "report"}]


def test_two_headers_of_one_name_are_refused(app: App) -> None:
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost"), (b"host", b"evil")]}
    assert app.asgi.refusal(scope) == (400, "two headers host")


def test_the_page_allows_its_own_scripts_only(client: TestClient) -> None:
    answer = client.get("/", headers=SITE)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert "unsafe" not in policy["script-src"]
    assert policy["script-src"].count("'sha256-") == answer.text.count("<script>")
    assert policy["style-src-elem"].count("'sha256-") == answer.text.count("<style>")
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["form-action"] == "'none'"
    for name, value in HEADERS.items():
        assert answer.headers[name] == value
    assert "http://" not in answer.text.replace("http://www.w3.org", "")
    assert "https://" not in answer.text


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8888", "127.0.0.1", "127.3.2.1:80", "[::1]", "[::1]:8765"])
def test_loopback_names_with_any_port(host: str) -> None:
    assert is_loopback(host)


PATHS = ["/etc/passwd", "..\\x", "~/x", "a/b.nii.gz", "file:///etc/passwd", "s3://x", "..", "a\x00b", "pyproject.toml"]


@pytest.mark.parametrize("path", PATHS)
def test_no_parameter_is_a_path(path: str) -> None:
    for value in (path, [path], {"a": path}, {path: 1}, [[1, path]]):
        with pytest.raises(UsageError, match="path of a file"):
            refuse_paths(value)
    with pytest.raises(UsageError, match="path of a file"):
        call_text("LabelMask", {"mask": path})
    question = {"case": 0, "target": {"kind": "other", "name": "LabelMask", "parameters": {"mask": path}}}
    with pytest.raises(UsageError, match="path of a file"):
        Question.of(question, 1, {})


def test_only_a_known_layer_may_look_like_a_path() -> None:
    """A layer can be called like a file of the working folder, a method's file cannot."""
    method = {"name": "GradCam", "parameters": {"layer": "pyproject.toml", "name": "x"}}
    with pytest.raises(UsageError, match="path of a file"):
        Question.of({"case": 0, "methods": [method]}, 1, {})
    question = Question.of({"case": 0, "methods": [method]}, 1, {}, ["pyproject.toml"])
    assert question.methods == ("GradCam(layer='pyproject.toml', name='x')",)
    other = {"name": "LabelMask", "parameters": {"mask": "pyproject.toml"}}
    with pytest.raises(UsageError, match="path of a file"):
        Question.of({"case": 0, "methods": [other]}, 1, {}, ["pyproject.toml"])


BAD: list[dict[str, Any]] = [
    {"case": 1},
    {"case": -1},
    {"case": True},
    {"case": "0"},
    {"case": 0, "target": {"kind": "voxel", "class": 1}},
    {"case": 0, "target": {"kind": "voxel", "class": "1", "world": [1, 2, 3]}},
    {"case": 0, "target": {"kind": "voxel", "class": 1, "world": [1, 2, float("nan")]}},
    {"case": 0, "target": {"kind": "eval", "class": 1}},
    {"case": 0, "target": {"kind": "other", "name": "__import__('os')"}},
    {"case": 0, "methods": [{"name": "Saliency), Rise(", "parameters": {}}]},
    {"case": 0, "methods": [{"name": "Saliency", "parameters": {"abs=True), Rise(n": 1}}]},
    {"case": 0, "methods": [{"name": "Saliency", "parameters": [1]}]},
    {"case": 0, "methods": [{"name": "Saliency"}] * 21},
    {"case": 0, "methods": "Saliency"},
    {"case": 0, "box": [[1, 2, 3]]},
    {"case": 0, "box": [[1, 2, 3], ["4", 5, 6]]},
    {"case": 0, "time_limit": 0},
    {"case": 0, "time_limit": float("inf")},
]


@pytest.mark.parametrize("request_", BAD, ids=str)
def test_a_question_is_checked(request_: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Question.of(request_, 1, {1: "liver"})


def test_a_hostile_class_name_stays_a_word_of_the_targets_name() -> None:
    """It is part of a text that is parsed, and of the names of files."""
    name = "', others=0), Rise(n_samples=1) /../<b>\"x"
    request = {"case": 0, "target": {"kind": "voxel", "class": 1, "against": 0, "world": [1, 2, 3]}}
    question = Question.of(request, 1, {1: name, 0: name})
    from esegeta_monai.targets import TARGETS

    target = TARGETS.create(question.target)
    assert type(target).__name__ == "Contrast"
    assert target.target.class_index == 1
    assert list(target.target.world) == [1.0, 2.0, 3.0]
    assert not set("<>'\"/\\(),=") & set(target.given_name)
