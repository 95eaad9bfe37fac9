"""What is asked in a run, and how much of it."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.scoring import plan, rounds
from benchmarks.scoring.work import GRPC, HTTP, KINDS, TOP_64, Load, Skipped, teacher_rows
from protos.scores import Field
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.theoretical_backend import TheoreticalBackend

LOAD = Load(tokens=64, score_start=5, per_call=4, vocab=1_000)
INFO = TheoreticalBackend(BackendOptions("theory")).info


def test_sequences_of_a_load_are_distinct_and_inside_the_vocabulary() -> None:
    found = LOAD.sequences(seed=1, count=20, candidates=0)
    assert len({s.token_ids.tobytes() for s in found}) == 20
    assert all(int(s.token_ids.min()) >= 0 and int(s.token_ids.max()) < 1_000 for s in found)
    assert {s.positions for s in found} == {59}


def test_seeds_give_other_sequences() -> None:
    assert not np.array_equal(LOAD.ids(1, 1)[0], LOAD.ids(2, 1)[0])


def test_candidates_of_a_position_are_distinct() -> None:
    (sequence,) = LOAD.sequences(seed=3, count=1, candidates=64)
    assert sequence.candidate_ids is not None
    assert sequence.candidate_ids.shape == (59, 64)
    assert all(len(np.unique(row)) == 64 for row in sequence.candidate_ids)
    assert int(sequence.candidate_ids.max()) < 1_000


def test_a_kind_asks_for_what_the_teacher_offers() -> None:
    assert TOP_64.spec(INFO).fields(0) == TOP_64.spec(INFO).want
    public = replace(INFO, fields=frozenset({Field.TOKEN_LOGPROBS, Field.TOP}))
    assert TOP_64.spec(public).want == {Field.TOKEN_LOGPROBS, Field.TOP}
    with pytest.raises(Skipped, match="tail_logprob"):
        KINDS["top-64, temperatures 1 and 2"].spec(public)


def test_the_first_number_of_clients_is_for_every_kind_on_both_paths() -> None:
    rows = teacher_rows([4, 1, 16])
    assert {(row.kind, row.path) for row in rows if row.clients == 4} == {(k, p) for k in KINDS for p in (GRPC, HTTP)}
    assert [(row.kind, row.path) for row in rows if row.clients != 4] == [(TOP_64.name, GRPC)] * 2


@pytest.mark.parametrize("clients", [1, 4, 16])
def test_all_clients_together_keep_the_engine_busy(clients: int) -> None:
    planned = plan.plan_of(plan.parser().parse_args(["--clients", str(clients)]))
    job = planned.job(teacher_rows([clients])[0], {"grpc": "g", "http": "h"})
    assert clients * job.in_flight * job.load.call_tokens >= 4 * planned.batch_tokens


def test_a_round_is_as_long_as_asked_and_never_less_than_what_is_in_flight() -> None:
    job = plan.plan_of(plan.parser().parse_args([])).job(teacher_rows([4])[0], {"grpc": "g", "http": "h"})
    assert rounds.calls_for(40_000, 10, 4, job) * 4 * job.load.call_tokens == pytest.approx(400_000, rel=0.1)
    assert rounds.calls_for(10, 1, 4, job) > job.in_flight


def test_an_engine_of_its_own_gets_the_servers_arguments() -> None:
    from pathlib import Path

    words = ["--shape", "qwen3-235b-a22b-int4", "--engine-args", '{"gpu_memory_utilization": 0.5}']
    found = plan.plan_of(plan.parser().parse_args(words)).vllm_arguments(Path("model"))
    assert found["gpu_memory_utilization"] == 0.5
    assert found["load_format"] == "dummy"
    assert found["max_model_len"] == 2_049
    assert found["max_num_batched_tokens"] == 8_192


@pytest.mark.parametrize(
    "words",
    [
        ["--only", "prefill,nothing"],
        ["--tokens", "10", "--score-start", "10"],
        ["--tokens", "100000"],
        ["--shape", "qwen3-8b", "--backend", "transformers"],
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"--only|--tokens|--shape"):
        plan.plan_of(plan.parser().parse_args(words))
