"""vLLM's own containers of log-probabilities as arrays, for releases where nothing can be kept."""

from __future__ import annotations

import numpy as np
import pytest

from teacher_server.backends.vllm_tap import alternatives

pytestmark = pytest.mark.vllm


def test_flat_lists_become_the_arrays_that_they_were_made_of() -> None:
    from vllm.logprobs import append_logprobs_for_next_position, create_prompt_logprobs

    ids = np.array([[7, 3, 9], [3, 3, 1], [5, 8, 2]], dtype=np.int32)
    numbers = np.log(np.array([[0.1, 0.5, 0.2], [0.6, 0.6, 0.1], [0.2, 0.3, 0.25]], dtype=np.float32))
    flat = create_prompt_logprobs(flat_logprobs=True)
    for row, values in zip(ids.tolist(), numbers.tolist(), strict=True):
        append_logprobs_for_next_position(flat, row, values, [None] * 3, rank=4, num_logprobs=2)
    got_ids, got_numbers = alternatives(flat)
    np.testing.assert_array_equal(got_ids, ids)
    np.testing.assert_allclose(got_numbers, numbers)


def test_what_is_no_container_of_log_probabilities_is_refused() -> None:
    with pytest.raises(ValueError, match="the engine gave NoneType where log-probabilities were expected"):
        alternatives(None)
