"""Does the student wait for the teacher? The embedded pair, real servers, and a slow network in between.

    python benchmarks/overlap.py [--rounds 3] [--steps 16] [--out result.json] [--page docs/performance.md]

The trainer runs in this process on one core, the teacher in one of its own. A teacher that is as fast as it can be is
asked through a TCP proxy that delays every byte, and through the same proxy without a delay, in both stages. A teacher
that takes as long to score a step's rollouts as their training takes answers a student that trains on fresh rollouts,
and one whose rollouts are a step old. Cases take turns in each round, and ratios are within a round, because machines
drift. The exit code is 1 where a bar was missed. --read shows an earlier result.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import re
import statistics
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.scoring import machine
from benchmarks.scoring.processes import running, wait
from benchmarks.waiting import report
from benchmarks.waiting.proxy import delaying
from student_trainer import history
from student_trainer.config import Config
from student_trainer.run import run

ROOT = Path(__file__).resolve().parent.parent
LATENCY_MS, WARM_UP, START_S = 200, 2, 120.0
BATCH, ACCUMULATION = 16, 4


@contextmanager
def teacher(work: Path, tokens_per_second: float = 0.0) -> Iterator[dict[str, str]]:
    """{"grpc": ..., "http": ...} of the embedded pair's teacher, no faster than that (0: as fast as it goes)."""
    ready, log = work / "ready.json", work / "teacher.log"
    ready.unlink(missing_ok=True)
    with running(["-m", "benchmarks.waiting.paced_teacher", str(tokens_per_second), str(ready)], log) as process:
        wait(process, log, ready.exists, START_S, "the teacher")
        yield json.loads(ready.read_text())


def scored_tokens(http: str) -> float:
    """Tokens that a server has scored for all clients, as its metrics say."""
    with urllib.request.urlopen(f"{http}/metrics") as answer:
        text = answer.read().decode()
    return sum(map(float, re.findall(r"^teacher_scored_tokens_total\{[^}]*\} (\S+)$", text, re.MULTILINE)))


class Bench:
    """The runs of one result, below the folder `work`."""

    def __init__(self, work: Path, steps: int) -> None:
        self.work, self.steps, self.count = work, steps, 0
        self.responses: Path | None = None

    def train(self, address: str, stage: str, staleness: int = 0, steps: int | None = None) -> list[dict[str, Any]]:
        """The metrics of the steps that count: the first WARM_UP ones begin with nothing under way, the last one has
        nothing to sample.
        """
        self.count += 1
        folder = self.work / f"run-{self.count}"
        total = WARM_UP + (self.steps if steps is None else steps) + 1
        sizes = {"batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATION, "top_k": 16, "max_new_tokens": 48}
        sizes |= {"temperature": 1.0, "num_epochs": 1, "max_steps": total}
        first: dict[str, Any] = sizes | {
            "modes": "mixed",
            "max_prompts": (WARM_UP + self.steps + 1) * BATCH * ACCUMULATION,
        }
        if self.responses is not None:
            first["dataset_path"] = str(self.responses)
        config = Config.model_validate(
            {
                "models": {"student_model": str(ROOT / "tiny_pair" / "student_base"), "torch_dtype": "float32"},
                "data": {
                    "data_path": str(ROOT / "dataset" / "arithmetic.json"),
                    "max_examples": 4096,
                    "max_length": 128,
                    "val_ratio": 0.0,
                },
                "training": {
                    "output_dir": str(folder),
                    "log_file": str(self.work / "trainer.log"),
                    "logging_steps": 1,
                    "save_steps": 10**6,
                    "use_tensorboard": False,
                },
                "non_policy_distillation": first,
                "policy_distillation": sizes | {"learning_rate": 1e-4, "max_staleness": staleness},
                "teacher": {"endpoint": address, "patience": 60},
            }
        )
        part = "non_policy" if stage == "stage 1" else "policy"
        run(config, part, None, Console(file=io.StringIO()))
        root = folder / f"{part}_distillation"
        if stage == "stage 1" and self.responses is None:
            self.responses = root / "responses.parquet"
        lines = [line for line in history.read(root) if "loss" in line]
        assert len(lines) == total, f"{len(lines)} lines of metrics for {total} steps"
        return lines[WARM_UP:-1]

    def rate(self, fast: dict[str, str]) -> float:
        """Tokens/s of a teacher that takes as long for a step's rollouts as their training takes."""
        self.train(fast["grpc"], "stage 2", 1, steps=2)  # the first run of a process is slower
        before = scored_tokens(fast["http"])
        lines = self.train(fast["grpc"], "stage 2", 1)
        tokens = (scored_tokens(fast["http"]) - before) / (WARM_UP + self.steps + 1)
        return tokens / statistics.median(line["seconds_training"] for line in lines)

    def measure(self, rounds: int) -> dict[str, Any]:
        """Everything, in turns."""
        runs: list[dict[str, Any]] = []

        def keep(turn: int, stage: str, staleness: int, which: str, address: str) -> None:
            case = {"stage": stage, "max_staleness": staleness, "teacher": which}
            lines = self.train(address, stage, staleness)
            runs.append({"case": case, "round": turn, "lines": lines})
            print(
                f"round {turn}, {', '.join(map(str, case.values()))}: waiting {report.waiting(runs[-1]):.1%}",
                flush=True,
            )

        with teacher(self.work) as fast:
            self.train(fast["grpc"], "stage 1", steps=0)
            rate = self.rate(fast)
            with delaying(fast["grpc"], 0.0) as near, delaying(fast["grpc"], LATENCY_MS / 1000) as far:
                for turn in range(rounds):
                    for stage, staleness in (("stage 1", 0), ("stage 2", 0), ("stage 2", 1)):
                        both = (report.latency(0), near), (report.latency(LATENCY_MS), far)
                        for which, address in both if turn % 2 == 0 else reversed(both):
                            keep(turn, stage, staleness, which, address)
        with teacher(self.work, rate) as paced:
            for turn in range(rounds):
                for staleness in (0, 1):
                    keep(turn, "stage 2", staleness, report.PACED, paced["grpc"])
        return {
            "machine": machine.describe(),
            "rounds": rounds,
            "steps": self.steps,
            "warm_up": WARM_UP,
            "rows": BATCH * ACCUMULATION,
            "latency_ms": LATENCY_MS,
            "paced_tokens_per_second": rate,
            "runs": runs,
        }


def main() -> int:
    """Measures, or reads what was measured; shows it and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="steps of a run that count")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    parser.add_argument("--page", type=Path, help="page with a place for the result")
    parser.add_argument("--read", type=Path, help="a result file, in place of measuring")
    options = parser.parse_args()
    if options.read:
        result = json.loads(options.read.read_text("utf-8"))
    else:
        torch.set_num_threads(1)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        with tempfile.TemporaryDirectory(prefix="overlap-") as work:
            result = Bench(Path(work), options.steps).measure(options.rounds)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(report.text(result))
    if options.page:
        options.page.write_text(report.with_result(options.page.read_text("utf-8"), result), "utf-8")
    return int(report.missed(result))


if __name__ == "__main__":
    sys.exit(main())
