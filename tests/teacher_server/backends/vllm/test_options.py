"""What an operator may pass to vLLM, and how a wrong word is answered; no engine is started."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from teacher_server.backends import vllm_options
from teacher_server.backends.options import BackendOptions

pytestmark = pytest.mark.vllm
MODEL = Path(__file__).resolve().parents[4] / "tiny_pair" / "teacher"


def made(engine_args: dict[str, Any] | None = None, **chosen: Any) -> Any:
    options = BackendOptions(model="m", backend="vllm", vllm_engine_args=engine_args or {}, **chosen)
    return vllm_options.engine_args(options, MODEL, 1000)


@pytest.mark.parametrize(
    ("engine_args", "chosen", "words"),
    [
        ({"tensor_paralel_size": 2}, {}, "tensor_paralel_size is no argument.*did you mean tensor_parallel_size"),
        ({"zzz": 2}, {}, "zzz is no argument of this vLLM's engine$"),
        ({"model": "x"}, {}, "model cannot be chosen there: use --model"),
        ({"max_model_len": 5}, {}, "max_model_len cannot be chosen there: use --max-sequence-tokens"),
        ({"worker_extension_cls": "x"}, {}, "worker_extension_cls cannot be chosen there: this server sets it"),
        ({}, {"device": "cuda"}, "--device cuda was asked for, but this vLLM is built for cpu"),
        ({}, {"attn_implementation": "eager"}, "attn_implementation eager is for the transformers backend"),
        ({}, {"quantization": "8bit"}, "vLLM quantises to 8 bits by FP8"),
        ({}, {"quantization": "4bit"}, "pip install vllm-bnb-plugin"),
        ({"quantization": "fp8"}, {"quantization": "4bit"}, "exclude each other"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_words(
    engine_args: dict[str, Any], chosen: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        made(engine_args, **chosen)


def test_everything_else_passes_through_over_the_defaults() -> None:
    args = made({"tensor_parallel_size": 4, "kv_cache_dtype": "fp8", "max_num_batched_tokens": 77}, batch_tokens=500)
    assert (args.tensor_parallel_size, args.kv_cache_dtype, args.max_num_batched_tokens) == (4, "fp8", 77)
    assert made(batch_tokens=500).max_num_batched_tokens == 500
    assert (args.max_model_len, args.max_logprobs) == (1001, 1024)


@pytest.mark.parametrize(("version", "warned"), [("0.32.1", False), ("0.33.0", False), ("0.40.0", True)])
def test_a_release_that_nobody_tried_is_named(version: str, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        vllm_options.check_version(version)
    assert ("was not tested with this server, 0.32 and 0.33 were" in caplog.text) is warned
