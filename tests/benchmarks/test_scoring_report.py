"""Numbers of a run become a table, bars and a page."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scoring import report
from benchmarks.scoring.rounds import Round, summary
from benchmarks.scoring.work import GRPC, IN_PROCESS, PREFILL, TOP_64, VLLM_HTTP

ROOT = Path(__file__).resolve().parents[2]


def row(kind: str, path: str, rate: float, clients: int = 4, **more: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "path": path,
        "clients": clients,
        "tokens_per_s": rate,
        "lowest": rate,
        "highest": rate,
    } | more


def result(*rows: dict[str, Any], shape: str = "qwen3-8b", **wire: float) -> dict[str, Any]:
    load = {"tokens": 2048, "score_start": 1, "per_call": 4, "vocab": 151_669}
    versions = {"vllm": "0.33.0"}
    machine = {"date": "2026-01-02T03:04:05", "gpu": ["NVIDIA H100"], "cores": 16, "cpu": "a CPU", "python": "3.11"}
    return {
        "machine": machine | {"versions": versions, "commit": ""},
        "command": "python benchmarks/teacher_scoring.py",
        "plan": {"shape": shape, "dtype": "bfloat16", "load": load, "batch_tokens": 8192, "repeats": 3, "seconds": 3.0},
        "servers": {"teacher": {"info": {"engine": "vllm 0.33.0", "fields": ["top", "token_logprobs"]}}},
        "rows": list(rows),
        "wire": {TOP_64.name: wire} if wire else {},
    }


WHOLE = result(
    row(PREFILL, IN_PROCESS, 40_000.0, 0),
    row(TOP_64.name, GRPC, 35_000.0, server_cores=0.5, engine_cores=1.25, clients_cores=0.2),
    row(TOP_64.name, GRPC, 20_000.0, clients=1),
    row(TOP_64.name, VLLM_HTTP, 1_250.0, bytes_per_token=4_898.0),
    {"kind": "top-1", "path": GRPC, "clients": 4, "failure": "the server\nbroke"},
    {"kind": "hidden states", "path": GRPC, "clients": 4, "skipped": "not offered"},
    bytes_per_position=524.1,
    request_bytes_per_position=4.0,
    http_bytes_per_position=524.2,
    decode_ms=11.0,
)


def round_of(rate: float) -> Round:
    return Round(rate, 2.0, 100, 90, 0, server_cores=rate / 100, engine_cores=0.0, clients_cores=0.0)


def test_a_row_is_the_median_of_its_rounds_with_their_spread() -> None:
    found = summary([round_of(30.0), round_of(10.0), round_of(20.0)])
    assert (found["lowest"], found["tokens_per_s"], found["highest"]) == (10.0, 20.0, 30.0)
    assert found["server_cores"] == 0.2
    assert found["tokens"] == 300


def test_bars_compare_rows_of_the_same_run() -> None:
    found = {bar.claim: (bar.value, bar.verdict) for bar in report.bars(WHOLE)}
    assert list(found.values()) == [(0.875, "pass"), (28.0, "pass"), (524.1, "pass"), (11.0, "FAIL")]


def test_what_was_not_measured_is_neither_passed_nor_failed() -> None:
    assert {bar.verdict for bar in report.bars(result(row(TOP_64.name, GRPC, 1.0)))} == {"not measured"}


def test_the_large_shape_has_a_bar_of_its_own() -> None:
    rows = (row(PREFILL, IN_PROCESS, 7_000.0, 0), row(TOP_64.name, GRPC, 6_300.0))
    bars = report.bars(result(*rows, shape="qwen3-235b-a22b-int4"))
    assert [(bar.limit, bar.verdict) for bar in bars[:1]] == [(0.95, "FAIL")]
    assert not any("vLLM" in bar.claim for bar in bars)


def test_the_table_says_the_share_of_prefill_and_what_failed() -> None:
    lines = report.table(WHOLE)
    assert len({len(line) for line in lines}) == 1
    (top, *_) = [line for line in lines if "35,000" in line]
    assert [cell.strip() for cell in top.split("|")[5:11]] == [
        "35,000 to 35,000",
        "87.5%",
        "524.1",
        "0.50",
        "1.25",
        "0.20",
    ]
    assert any("failed" in line for line in lines)
    assert any("skipped" in line for line in lines)
    assert report.notes(WHOLE)[0] == "- top-1, gRPC: failed: the server\nbroke"
    assert "does not offer candidate_logprobs" in report.notes(WHOLE)[-1]


def test_a_page_keeps_its_text_and_gets_the_results() -> None:
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.with_results(page, [WHOLE])
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "old" not in once
    assert report.text(WHOLE) in once
    assert report.with_results(once, [WHOLE]) == once
    with pytest.raises(ValueError, match="no place"):
        report.with_results("nothing", [])


def test_the_page_of_this_tree_follows_from_its_result_files() -> None:
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    assert page == report.with_results(page, [json.loads(file.read_text("utf-8")) for file in files])
