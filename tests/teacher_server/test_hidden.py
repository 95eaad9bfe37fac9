"""Memory for hidden states is reserved before work starts, given back as clients read, and refused beyond the limit."""

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest

from protos import errors
from protos.scores import Field, ScoreRequest, ScoreSpec, Sequence
from teacher_server.auth import Caller
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.theoretical_backend import TheoreticalBackend
from teacher_server.hidden import HiddenBudget

INFO = replace(TheoreticalBackend(BackendOptions(model="m")).info, hidden_size=4, hidden_dtype="bfloat16")
CALLER = Caller("me")
SPEC = ScoreSpec(want=frozenset({Field.HIDDEN_STATES}))


def call(*positions: int, spec: ScoreSpec = SPEC) -> ScoreRequest:
    return ScoreRequest(tuple(Sequence(np.arange(n + 1), 1) for n in positions), spec)


def test_each_sequence_gives_back_its_bytes_once() -> None:
    budget = HiddenBudget(1000)
    with budget.hold(call(10, 20), INFO, CALLER) as hold:
        assert budget.held == 8 * 30
        hold.release(1)
        hold.release(1)
        assert budget.held == 80
    assert budget.held == 0


def test_a_call_that_does_not_fit_beside_others_is_asked_to_retry() -> None:
    budget = HiddenBudget(400)
    with budget.hold(call(30), INFO, Caller("other")) as hold:
        with (
            pytest.raises(
                errors.Overloaded, match="take 240 of 400 bytes, 0 of them this client's; 240 more do not fit"
            ) as caught,
            budget.hold(call(30), INFO, CALLER),
        ):
            pass
        assert caught.value.retry_after_s
        hold.release(0)
        with budget.hold(call(30), INFO, CALLER):
            assert budget.held == 240


def test_a_call_that_never_fits_is_too_large_and_one_without_hidden_states_takes_nothing() -> None:
    budget = HiddenBudget(100)
    numbers = "30 positions, 8 bytes each, take 240 bytes, this server holds 100"
    with pytest.raises(errors.TooLarge, match=numbers), budget.hold(call(10, 20), INFO, CALLER):
        pass
    with budget.hold(call(1000, spec=ScoreSpec(5)), INFO, CALLER):
        assert budget.held == 0


def test_one_client_cannot_take_all_of_it() -> None:
    budget = HiddenBudget(1000)
    with ExitStack() as held:
        for _ in range(6):
            held.enter_context(budget.hold(call(10), INFO, Caller("greedy")))
        with pytest.raises(errors.Overloaded, match="480 of them this client's"):
            held.enter_context(budget.hold(call(10), INFO, Caller("greedy")))
        held.enter_context(budget.hold(call(50), INFO, Caller("modest")))
    assert budget.held == 0


def test_the_delay_comes_from_how_fast_clients_read() -> None:
    now = 0.0
    budget = HiddenBudget(1000, lambda: now)
    with budget.hold(call(50, 50), INFO, Caller("slow")) as hold:
        now = 20.0
        hold.release(0)
        with pytest.raises(errors.Overloaded) as caught, budget.hold(call(100), INFO, CALLER):
            pass
        assert caught.value.retry_after_s == pytest.approx(200 / (400 / 20))
