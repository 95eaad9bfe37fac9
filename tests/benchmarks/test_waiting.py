"""The parts of benchmarks/overlap.py: bytes that come late and whole, a teacher's pace, and what runs say."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.waiting import report
from benchmarks.waiting.paced_teacher import Pace
from benchmarks.waiting.proxy import delaying

DATA = bytes(range(256)) * 4096


@pytest.fixture
def echo() -> Iterator[str]:
    """host:port of a server that sends back what it gets, once it has got all of it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                found = b""
                while data := connection.recv(1 << 16):
                    found += data
                connection.sendall(found)

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize("delay_s", [0.0, 0.05])
def test_the_proxy_delivers_everything_in_order(echo: str, delay_s: float) -> None:
    with delaying(echo, delay_s) as address:
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(DATA)
            connection.shutdown(socket.SHUT_WR)
            found = b""
            while data := connection.recv(1 << 16):
                found += data
    assert found == DATA


def test_answers_leave_one_after_the_other_at_the_pace_and_none_waits_for_nobody() -> None:
    pace = Pace(100.0)
    assert [pace.leave(10.0, 50), pace.leave(10.1, 50)] == pytest.approx([10.5, 11.0])
    assert pace.leave(20.0, 10) == pytest.approx(20.1)
    assert Pace(0.0).leave(3.0, 1000) == 3.0


def run(stage: str, staleness: int, teacher: str, turn: int, sampling: float, waiting: float, training: float) -> Any:
    line = {"seconds_sampling": sampling, "seconds_teacher": waiting, "seconds_training": training}
    case = {"stage": stage, "max_staleness": staleness, "teacher": teacher}
    return {"case": case, "round": turn, "lines": [line | {"completion_tokens": 100.0}] * 3}


def result(*runs: Any) -> Any:
    machine = {"date": "2026-11-24T00:00", "cores": 2, "cpu": "a CPU", "python": "3.11", "versions": {}, "commit": "c"}
    numbers = {"rounds": 2, "steps": 3, "warm_up": 1, "rows": 4, "latency_ms": 200, "paced_tokens_per_second": 1.0}
    return {"machine": machine, **numbers, "runs": list(runs)}


def test_a_run_says_its_share_of_waiting_and_its_rate() -> None:
    one = run("stage 2", 1, report.PACED, 0, 1.0, 0.5, 3.5)
    assert report.waiting(one) == pytest.approx(0.1)
    assert report.tokens_per_second(one) == pytest.approx(20.0)


def test_the_fall_of_throughput_is_the_median_of_ratios_within_rounds() -> None:
    near, far = report.latency(0), report.latency(200)
    steps = [(1.0, 1.25), (2.0, 2.0), (4.0, 4.0 / 0.9)]
    runs = [
        run("stage 1", 0, t, i, 0, 0, s) for i, pair in enumerate(steps) for t, s in zip((near, far), pair, strict=True)
    ]
    assert report.fall(result(*runs), "stage 1", 0) == pytest.approx(0.1)
    assert report.fall(result(*runs), "stage 2", 1) is None


@pytest.mark.parametrize(("share", "verdict", "missed"), [(0.02, "pass", False), (0.3, "FAIL", True)])
def test_the_page_gets_tables_and_verdicts_between_its_markers(share: float, verdict: str, missed: bool) -> None:
    found = result(run("stage 2", 1, report.PACED, 0, 0.0, share, 1 - share))
    page = report.with_result(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", found)
    assert page.startswith(f"before\n{report.BEGIN}\n")
    assert page.endswith(f"\n{report.END}\nafter\n")
    assert "old" not in page
    assert f"| stage 2 | 1 | {report.PACED} | 1.000 | 0.000 | {share:.3f} |" in page
    assert f"| {share:.1%} | 10% | {verdict} |" in page
    assert page.count("not measured") == 2
    assert report.missed(found) is missed
    with pytest.raises(ValueError, match=r"needs the lines <!-- results: written by benchmarks/overlap\.py"):
        report.with_result("a page", found)
