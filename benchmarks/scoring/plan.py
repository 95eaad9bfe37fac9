"""What one run measures, from its command line. Knows options, starts nothing."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scoring.client import Job
from benchmarks.scoring.shapes import SHAPES
from benchmarks.scoring.work import GRPC, PARTS, Load, Row

IN_FLIGHT_BATCHES = 6
"""Batches of tokens that all clients together keep with the server: enough that its engine never waits for one."""


@dataclass(frozen=True)
class Plan:
    """One run; see `parser` for what the fields mean."""

    shape: str
    backend: str
    dtype: str
    load: Load
    batch_tokens: int
    engine_args: dict[str, Any]
    clients: list[int]
    only: frozenset[str]
    seconds: float
    repeats: int
    budget: float
    tokenizer: Path | None

    def vllm_arguments(self, model: Path) -> dict[str, Any]:
        """vLLM's arguments for a plain engine on the model, equal to those that the server's engine gets."""
        ours = {"model": str(model), "dtype": self.dtype, "max_model_len": self.load.tokens + 1}
        return ours | {"max_num_batched_tokens": self.batch_tokens} | self.engine_args

    def seconds_of(self, row: Row) -> float:
        """About how long a round of this row takes: start and end weigh less where a bar is about the rate."""
        return self.seconds * (2 if "headline" in row.parts else 1)

    def job(self, row: Row, addresses: dict[str, str]) -> Job:
        """What each client of a row does."""
        address = addresses["grpc" if row.path == GRPC else "http"]
        together = row.clients * self.load.call_tokens
        in_flight = math.ceil(IN_FLIGHT_BATCHES * self.batch_tokens / together)
        return Job(address, row.kind, self.load, in_flight)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python benchmarks/teacher_scoring.py",
        description="How many tokens a second trainers get scored, beside what the engine could read.",
    )
    made.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-8b", help="model, with random weights")
    made.add_argument("--backend", choices=("vllm", "transformers"), default="vllm")
    made.add_argument("--dtype", help="data type; the shape's own if unset")
    made.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="folder of a real tokenizer instead of a made-up one"
    )
    made.add_argument("--tokens", type=int, default=2048, help="tokens of a sequence")
    made.add_argument("--score-start", type=int, default=1, help="first scored position")
    made.add_argument("--per-call", type=int, default=4, help="sequences of one call")
    made.add_argument("--batch-tokens", type=int, default=8192, help="tokens of one engine step")
    made.add_argument(
        "--engine-args", type=json.loads, default={}, metavar="JSON", help="vLLM's arguments, over the shape's own"
    )
    made.add_argument(
        "--clients", type=int, nargs="+", default=[4, 1, 16], help="client processes; the first number is for most rows"
    )
    made.add_argument("--only", default=",".join(PARTS), help=f"what to measure, of {','.join(PARTS)}")
    made.add_argument(
        "--seconds",
        type=float,
        default=3.0,
        help="about how long one round of a row takes; twice that where a bar is about it",
    )
    made.add_argument("--repeats", type=int, default=3, help="rounds of a row")
    made.add_argument("--budget", type=float, default=540.0, help="seconds after which no further row begins")
    made.add_argument("--work", type=Path, help="folder for the model and the logs; a temporary one if unset")
    made.add_argument("--out", type=Path, metavar="FILE.json", help="where to write every number")
    made.add_argument(
        "--read", type=Path, nargs="+", metavar="FILE.json", help="measure nothing: show the results of earlier runs"
    )
    made.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the rates (needs matplotlib)")
    made.add_argument("--page", type=Path, metavar="FILE.md", help="write the results between a page's markers")
    return made


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The plan of a command line; ValueError for a combination that makes no sense."""
    shape = SHAPES[arguments.shape]
    only = frozenset(arguments.only.split(","))
    if only - set(PARTS):
        raise ValueError(f"--only names {', '.join(sorted(only - set(PARTS)))}; it knows {', '.join(PARTS)}")
    most = int(shape.config["max_position_embeddings"]) - 1
    if not 1 <= arguments.score_start < arguments.tokens <= most:
        raise ValueError(
            f"--score-start {arguments.score_start} and --tokens {arguments.tokens} do not fit: "
            f"1 <= score start < tokens <= {most}"
        )
    if arguments.backend == "transformers" and not shape.weights:
        raise ValueError(f"--shape {arguments.shape} has no weights, and only vLLM makes them up; use --shape tiny")
    return Plan(
        shape=arguments.shape,
        backend=arguments.backend,
        dtype=arguments.dtype or shape.dtype,
        load=Load(arguments.tokens, arguments.score_start, arguments.per_call, shape.tokens),
        batch_tokens=arguments.batch_tokens,
        engine_args={**shape.engine_args, **arguments.engine_args},
        clients=arguments.clients,
        only=only,
        seconds=arguments.seconds,
        repeats=arguments.repeats,
        budget=arguments.budget,
        tokenizer=arguments.tokenizer,
    )


def parse(words: Sequence[str] | None = None) -> tuple[argparse.Namespace, Plan]:
    """The command line and its plan; ends the process with a message for one that makes no sense."""
    made = parser()
    arguments = made.parse_args(words)
    try:
        return arguments, plan_of(arguments)
    except ValueError as error:
        made.error(str(error))
