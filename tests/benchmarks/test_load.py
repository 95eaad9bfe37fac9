"""What a load run says of its numbers, and that its server and its clients do what they say."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.under_load import clients, plan, report, run
from benchmarks.under_load.clients import Call, Offer, Record
from benchmarks.under_load.server import Table
from protos.scores import ScoreSpec, Sequence
from teacher_server.backends.theory import Ring

ROOT = Path(__file__).resolve().parents[2]
CALL = Call(2, 10, 256)


def row(load: float, goodput: float, **changes: Any) -> dict[str, Any]:
    numbers = {
        "clients": 8,
        "load": load,
        "offered": 0.0,
        "goodput": goodput,
        "answered": 9,
        "refused": 9,
        "failed": {},
    }
    numbers |= {"refused_p50_ms": 1.0, "refused_p99_ms": 9.0, "jain": 0.99}
    return numbers | {"server_cores": 0.5, "clients_cores": 0.1, "others_cores": 0.0} | changes


def result(*rows: dict[str, Any], others: float = 0.0, growth: float = 0.0) -> dict[str, Any]:
    memory = {"growth": growth, "begin_mib": 90.0, "end_mib": 90.0, "slope_mib_per_minute": 0.0, "first_mib": 80.0}
    server = {"capacity": 100.0, "call": asdict(CALL), "rows": list(rows), "memory": memory | {"calls": 5}}
    machine = {
        "date": "2026-01-02T03",
        "cores": 2,
        "cpu": "a CPU",
        "python": "3.11",
        "commit": "",
        "others_cores": others,
    }
    plan_ = {"queue_s": 1.5, "steady_s": 20.0}
    return {"command": "x", "machine": machine, "plan": plan_, "servers": {"theory": server}, "took_s": 1.0}


def test_a_run_passes_only_where_every_overload_keeps_goodput_and_refuses_fast() -> None:
    good = [row(0.5, 50.0, refused=0, refused_p99_ms=None), row(2.0, 100.0), row(4.0, 96.0)]
    assert not report.missed(result(*good))
    for bad in (
        row(4.0, 94.0),
        row(4.0, 99.0, refused_p99_ms=51.0),
        row(2.0, 99.0, jain=0.9),
        row(2.0, 99.0, failed={"X": 1}),
    ):
        assert report.missed(result(*good, bad)), bad
    assert report.missed(result(*good, growth=0.05))


def test_the_page_says_that_a_machine_was_shared_and_keeps_what_is_around_the_block() -> None:
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    shown = report.with_result(page, result(row(4.0, 1.0), others=1.2))
    assert shown.startswith("before\n")
    assert shown.endswith("\nafter\n")
    assert "**The machine was shared**" in shown
    assert "old" not in shown
    with pytest.raises(ValueError, match="no place for results"):
        report.with_result("", result(row(4.0, 1.0)))


def test_goodput_counts_what_was_answered_in_the_measured_time_alone() -> None:
    offered = Offer(2, 100.0, 1.0, 10.0)
    records = [Record(0, t, t, t + 0.5, "OK") for t in np.arange(0.0, 20.0)]
    records += [Record(1, 19.5, 19.5, 19.6, "OVERLOADED"), Record(1, 20.0, 20.0, 20.1, "UNAVAILABLE")]
    found = clients.summary(records, offered, CALL)
    assert found["answered"] == 10  # those that ended from second 10 on, and before second 20
    assert found["goodput"] == 10 * CALL.total / 10
    assert (found["refused"], found["failed"]) == (1, {"UNAVAILABLE": 1})
    assert found["refused_p99_ms"] == pytest.approx(100)
    assert found["jain"] == pytest.approx(0.5)


def test_the_table_gives_the_rings_scores() -> None:
    ring, rng = Ring(256), np.random.default_rng(0)
    sequence = Sequence(rng.integers(0, 256, 30).astype(np.int32), 5)
    for spec in (ScoreSpec(), ScoreSpec(8, (1.0, 2.0))):
        right, got = ring.score(sequence, spec).arrays(), Table(ring).score(sequence, spec).arrays()
        assert right.keys() == got.keys()
        for name, array in right.items():
            np.testing.assert_array_equal(got[name], array)


def test_memory_that_grows_by_a_mib_a_second_is_seen() -> None:
    found = run.memory_summary([(float(t), 100.0 + t) for t in range(31)])
    assert found["slope_mib_per_minute"] == pytest.approx(60.0)
    assert found["growth"] > 0.1


def test_clients_offer_what_they_are_told_to_over_both_transports(tmp_path: Path) -> None:
    with run.server(run.arguments_of(plan.THEORY, plan.Plan(rate=1e5), tmp_path, 1e5), tmp_path) as (_, addresses):
        records = asyncio.run(clients.offer(Offer(4, 1200.0, 0.0, 1.0), CALL, addresses, 0))
    assert {record.client for record in records} == {0, 1, 2, 3}
    assert {record.outcome for record in records} == {"OK"}
    assert len(records) == pytest.approx(60, abs=4)


def test_the_page_holds_the_kept_result() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    kept = json.loads((ROOT / "benchmarks" / "results" / "load" / "load.json").read_text())
    assert report.with_result(page, kept) == page, "run benchmarks/load.py --read ... --page docs/reliability.md"
