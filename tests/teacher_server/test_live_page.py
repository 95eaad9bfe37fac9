"""The page at / in a real headless Chromium, and what it shows as JSON."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from protos.errors import TeacherError
from protos.scores import Prompt, Sampling, ScoreSpec, Sequence
from student_trainer.teacher_client import connect
from teacher_server.backends.theoretical_backend import Behaviour
from teacher_server.keys import make_key, write
from tests.chromium import PROGRAM, Page, browser
from tests.servers import Server, bearer, serving, theory, wait_for

needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="no chromium here; apt-get install chromium")
HOSTILE = "<img src=x onerror=document.title='owned'>"


def ids(seed: int, n: int = 60) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 200, n, dtype=np.int32)


def look(server: Server, key: str = "") -> dict[str, Any]:
    found = httpx.get(f"{server.http}/status", headers=bearer(key)).raise_for_status().json()
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def busy() -> Iterator[Server]:
    """A teacher of 20,000 tokens a second that fails on token 255, after some work of two clients."""
    with serving(theory(Behaviour(tokens_per_second=20_000, failing_id=255), model="Qwen3-235B-A22B")) as server:
        with connect(server.grpc, name="trainer-1") as one, connect(server.http, name=HOSTILE) as other:
            for _ in range(2):
                one.score([Sequence(ids(seed)) for seed in range(20)], ScoreSpec(8))
            other.score([Sequence(ids(3)), Sequence(ids(100))], ScoreSpec(8))
            one.generate([Prompt(token_ids=(1, 2))], Sampling(8, ignore_eos=True))
            with pytest.raises(TeacherError):
                other.score([Sequence(np.array([1, 255], dtype=np.int32))])
            with pytest.raises(TeacherError):
                one.score([Sequence(np.array([1, 90_000], dtype=np.int32))])
        yield server


def test_status_says_who_got_what_and_where_it_came_from(busy: Server) -> None:
    found = look(busy)
    assert (found["ready"], found["state"], found["name"]) == (True, "ready", "Qwen3-235B-A22B")
    clients = {one["name"]: one for one in found["clients"]}
    assert clients.keys() == {"trainer-1", HOSTILE}
    first = clients["trainer-1"]
    assert (first["calls"], first["failed"], first["in_flight"], first["waiting_tokens"]) == (4, 1, 0, 0)
    assert first["known_share"] == 0.5
    assert first["score"]["calls"] == 2
    assert 0 < first["score"]["p50"] <= first["score"]["p99"] < 60
    assert found["sequences"] == {"engine": 21, "memory": 21}
    assert found["steps"]["score"]["steps"] == 21
    assert found["steps"]["score"]["sequences"] == 1
    assert 0 <= found["last_step_s"] < 60
    assert [error["reason"] for error in found["errors"]] == ["INVALID_SEQUENCE", "TEACHER_FAILED"]


def test_an_error_of_what_was_sent_is_shown_without_its_words(busy: Server) -> None:
    secret = "the patient's name"
    answer = httpx.post(f"{busy.http}/v1/score", json={"sequences": ["a"], "top_k": secret})
    assert secret in answer.json()["detail"]
    found = look(busy)
    assert found["errors"][0]["request_id"] == answer.headers["x-request-id"]
    assert secret not in str(found)


def test_rates_are_tokens_per_second_and_fall_to_nothing() -> None:
    with serving(theory(Behaviour(tokens_per_second=2000))) as server, connect(server.grpc, name="me") as client:
        client.score([Sequence(ids(seed, 500)) for seed in range(12)])
        rate = wait_for(lambda: look(server)["rates"]["scored"])
        assert 200 <= rate <= 6000  # 6,000 tokens in 3 seconds, looked at some time after these began
        assert wait_for(lambda: look(server)["history"])
        assert [one["name"] for one in look(server)["clients"]] == ["me"]
        wait_for(lambda: look(server)["rates"]["scored"] == 0, 30)


def test_the_page_holds_no_data_and_loads_nothing_from_elsewhere(busy: Server) -> None:
    answer = httpx.get(f"{busy.http}/")
    assert "trainer-1" not in answer.text
    assert "Qwen3" not in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "src=" not in answer.text
    assert "http:" not in answer.text.replace("http://www.w3.org/2000/svg", "")


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """A page of a browser."""
    with browser() as found:
        yield found


@pytest.mark.slow
@needs_chromium
def test_a_browser_shows_clients_as_they_work_and_runs_nothing_of_theirs(
    busy: Server, page: Page, tmp_path: Path
) -> None:
    stop = threading.Event()

    def work() -> None:
        with connect(busy.grpc, name="trainer-1") as client:
            seed = 1000
            while not stop.is_set():
                client.score([Sequence(ids(seed + i, 400)) for i in range(8)] + [Sequence(ids(0))], ScoreSpec(8))
                seed += 8

    page.open(f"{busy.http}/")
    thread = threading.Thread(target=work)
    thread.start()
    try:
        page.wait_for("Number(document.getElementById('calls').textContent) > 0")
        page.wait_for("parseFloat(document.getElementById('scored').textContent) > 0")
        page.wait_for("document.querySelectorAll('#chart path.scored')[0].getAttribute('d').includes('L')")
        light = page.picture(tmp_path / "light.png", width=1280, height=1000, dark=False)
        dark = page.picture(tmp_path / "dark.png", width=1280, height=1000, dark=True)
    finally:
        stop.set()
        thread.join()
    text = str(page.eval("document.body.innerText"))
    for shown in ("Qwen3-235B-A22B", "ready", "trainer-1", HOSTILE, "TEACHER_FAILED", "theoretical 1"):
        assert shown in text, text
    assert page.eval("document.title") == "Qwen3-235B-A22B"
    assert page.eval("document.images.length") == 0
    assert page.complaints == []
    assert {address for address in page.requests if not address.startswith((busy.http, "data:"))} == set()
    assert light != dark
    narrow = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    page.picture(tmp_path / "narrow.png", width=420, height=900, dark=False)
    assert page.eval(narrow), "the page is wider than a telephone"
    if folder := os.environ.get("PICTURES"):
        (Path(folder) / "live.png").write_bytes(light)
        (Path(folder) / "live-dark.png").write_bytes(dark)


@pytest.mark.slow
@needs_chromium
def test_a_browser_says_that_the_teacher_is_gone_and_goes_on_when_it_is_back(page: Page) -> None:
    with serving(theory()) as server:
        port = int(server.http.rsplit(":", 1)[1])
        page.open(f"{server.http}/")
        page.wait_for("document.getElementById('state').textContent === 'ready'")
        assert page.eval("document.getElementById('lost').hidden")
    page.wait_for("document.getElementById('lost').textContent.startsWith('No answer since')")
    with serving(theory(), http_port=port):
        page.wait_for("document.getElementById('lost').hidden")


@pytest.mark.slow
@needs_chromium
def test_a_browser_gets_in_with_a_key_as_the_password_and_not_without(page: Page, tmp_path: Path) -> None:
    key, stored = make_key("operator")
    write(tmp_path / "keys.json", [stored])
    with serving(theory(), key=key, keys_file=str(tmp_path / "keys.json")) as server:
        page.open(f"{server.http}/")
        page.wait_for("document.body.innerText.includes('UNAUTHENTICATED')")
        page.password = key
        page.open(f"{server.http}/")
        page.wait_for("document.getElementById('state')?.textContent === 'ready'")
        assert page.eval("document.getElementById('lost').hidden")
