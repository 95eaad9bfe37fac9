"""One run from the first engine to the last: every part leaves a row, one that fails leaves its reason.

The result is written after each row, so that a run that is cut off leaves what it has measured.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx

from benchmarks.scoring import machine, rounds, servers, shapes, wire
from benchmarks.scoring.client import Job
from benchmarks.scoring.plan import Plan
from benchmarks.scoring.processes import Failed, in_process
from benchmarks.scoring.work import IN_PROCESS, KINDS, PREFILL, TOP_64, VLLM_HTTP, Row, Skipped, teacher_rows

WIRE_S = 240.0

Start = Callable[[Plan, Path, Path], AbstractContextManager[servers.Server]]


class Run:
    """Measures a plan; `result` holds what is known so far."""

    def __init__(self, plan: Plan, work: Path, out: Path | None) -> None:
        self._plan = plan
        self._work = work
        self._out = out
        self._begun = time.monotonic()
        self.result: dict[str, Any] = {
            "machine": machine.describe(),
            "command": shlex.join(["python", *sys.argv]),
            "plan": asdict(plan) | {"only": sorted(plan.only), "tokenizer": str(plan.tokenizer or "made up")},
            "servers": {},
            "rows": [],
            "wire": {},
        }

    def all(self) -> None:
        """Prefill, our server, vLLM's own server, as far as they are chosen and the time lasts."""
        only, clients = self._plan.only, self._plan.clients
        model = shapes.write(shapes.SHAPES[self._plan.shape], self._work / "model", self._plan.tokenizer)
        if "prefill" in only:
            self._prefill(model)
        if only - {"prefill", "vllm-http"}:
            rows = [row for row in teacher_rows(clients) if row.parts & only]
            self._serve(rows, servers.teacher, model, self._teacher)
        if "vllm-http" in only:
            rows = [Row(TOP_64.name, VLLM_HTTP, clients[0], frozenset())]
            self._serve(rows, servers.vllm_http, model, self._vllm_http)
        self._save()

    def _prefill(self, model: Path) -> None:
        with self._recorded(Row(PREFILL, IN_PROCESS, 0, frozenset())) as found:
            answer = servers.prefill(self._plan, model, self._work)
            rates = answer["rates"]
            found.update(answer, tokens_per_s=statistics.median(rates), lowest=min(rates), highest=max(rates))

    def _serve(
        self, rows: list[Row], start: Start, model: Path, use: Callable[[servers.Server, list[Row]], None]
    ) -> None:
        """Measures rows with a server of their own; where it does not start, or dies, each of them says so."""
        self._progress(f"starting: {start.__name__}")
        try:
            self._in_time()
            with start(self._plan, model, self._work) as server:
                said = {"command": shlex.join(server.command), "start_s": server.start_s, "info": server.info}
                self.result["servers"][start.__name__] = said
                use(server, rows)
        except (Failed, Skipped, OSError, httpx.HTTPError) as error:
            recorded = {(row["kind"], row["path"], row["clients"]) for row in self.result["rows"]}
            for row in rows:
                if (row.kind, row.path, row.clients) not in recorded:
                    with self._recorded(row):
                        raise error

    def _teacher(self, server: servers.Server, rows: list[Row]) -> None:
        wire_is_due = "wire" in self._plan.only
        for row in rows:
            with self._recorded(row) as found:
                self._in_time()
                job = self._plan.job(row, server.addresses)
                found.update(self._rounds(row, job, server, self._plan.seconds_of(row), self._plan.repeats))
            if wire_is_due:
                self._wire(server)
                wire_is_due = False
        if wire_is_due:
            self._wire(server)

    def _vllm_http(self, server: servers.Server, rows: list[Row]) -> None:
        for row in rows:
            with self._recorded(row) as found:
                load = replace(self._plan.load, per_call=1)
                job = Job(server.addresses["http"], None, load, in_flight=1, model=servers.VLLM_NAME)
                found.update(self._rounds(row, job, server, 0.0, max(1, self._plan.repeats - 1)))
                found["bytes_per_token"] = found["received"] / found["tokens"]

    def _rounds(self, row: Row, job: Job, server: servers.Server, seconds: float, repeats: int) -> dict[str, Any]:
        measured = rounds.measure(job, row.clients, server.pid, seconds=seconds, repeats=repeats)
        chosen = {"in_flight": job.in_flight, "sequences_per_call": job.load.per_call}
        return {**chosen, **rounds.summary(measured)}

    def _wire(self, server: servers.Server) -> None:
        self._progress("wire")
        try:
            self.result["wire"] = in_process(wire.measure, WIRE_S, server.addresses, self._plan.load, list(KINDS))
        except Failed as error:
            self.result["wire"] = {kind: {"failure": str(error)} for kind in KINDS}
        self._save()

    @contextmanager
    def _recorded(self, row: Row) -> Iterator[dict[str, Any]]:
        """Collects a row's numbers; what goes wrong becomes its note."""
        found: dict[str, Any] = {"kind": row.kind, "path": row.path, "clients": row.clients}
        self._progress(f"{row.kind}, {row.path}" + (f", {row.clients} clients" if row.clients else ""))
        try:
            yield found
        except Skipped as error:
            found["skipped"] = str(error)
        except Exception as error:  # noqa: BLE001 - one part that fails is one row, not the end of the run
            found["failure"] = str(error) or type(error).__name__
        self.result["rows"].append(found)
        self._save()

    def _in_time(self) -> None:
        spent = time.monotonic() - self._begun
        if spent > self._plan.budget:
            raise Skipped(f"not begun: {spent:.0f} s had passed, the budget is {self._plan.budget:.0f} s")

    def _progress(self, what: str) -> None:
        print(f"{time.monotonic() - self._begun:6.0f} s  {what}", file=sys.stderr, flush=True)

    def _save(self) -> None:
        self.result["seconds"] = time.monotonic() - self._begun
        if self._out is not None:
            self._out.write_text(json.dumps(self.result, indent=1) + "\n", "utf-8")
