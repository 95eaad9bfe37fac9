"""The Triton kernels against the formulas in float64: on a GPU compiled, elsewhere in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from protos.scores import ScoreSpec
from teacher_server.backends.readout import chunk_rows, float_head, read_chunk
from teacher_server.backends.readout_check import choose, disagreement, reference
from tests.teacher_server.backends.test_readout import TEMPERATURES, check, logits_of, rows_of

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
INTERPRETED = """
import torch
from teacher_server.backends.readout_check import disagreement
from teacher_server.backends.readout_triton import TritonKernels
print([disagreement(TritonKernels(), torch.device("cpu"), vocab) for vocab in (1, 7, 261, 5001)])
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested instead")
def test_the_kernels_agree_with_float64_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays" in ran.stderr:
        pytest.skip("the interpreter of this Triton does not work with this NumPy")
    assert ran.stdout == "['', '', '', '']\n", ran.stderr


@needs_cuda
@pytest.mark.parametrize("temperatures", TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("vocab", "top_k"), [(3000, 0), (3000, 1), (5001, 300), (20001, 64), (20001, 1024), (261, 261)]
)
def test_a_gpu_agrees_with_float64(vocab: int, top_k: int, dtype: torch.dtype, temperatures: tuple[float, ...]) -> None:
    from teacher_server.backends.readout_triton import TritonKernels

    wide = torch.full((8, -(-vocab // 64) * 64), 1e4, dtype=dtype, device="cuda")
    wide[:, :vocab] = logits_of(vocab)
    if top_k == vocab:
        wide[7] = wide[3]  # -inf among the top K of a whole vocabulary has no finite log-probability
    logits, rows, spec = wide[:, :vocab].cpu(), rows_of(vocab, 5), ScoreSpec(top_k, temperatures)
    got = read_chunk(wide[:, :vocab], rows, spec, spec.fields(5), TritonKernels())
    check({name: values.cpu() for name, values in got.items()}, logits, rows, spec)


@needs_cuda
def test_a_gpu_gets_the_triton_kernels_for_qwen3s_vocabulary() -> None:
    from teacher_server.backends.readout_triton import TritonKernels

    kernels = choose(torch.device("cuda"), 151_669)
    assert isinstance(kernels, TritonKernels)
    assert disagreement(kernels, torch.device("cuda"), 151_669) == ""


@needs_cuda
def test_a_gpus_chunk_is_whole_tiles_and_its_head_and_read_out_agree_with_float64() -> None:
    from teacher_server.backends.readout_triton import TritonKernels

    device, vocab = torch.device("cuda"), 151_669
    assert chunk_rows(vocab, device) % 256 == 0 or chunk_rows(vocab, device) < 256
    head = torch.nn.Linear(64, 151_936, bias=False, dtype=torch.bfloat16, device=device)
    states = torch.randn(8, 64, dtype=torch.bfloat16, device=device) * 10
    rows, spec = rows_of(vocab, 5), ScoreSpec(64, (1.0, 2.0))
    got = read_chunk(float_head(head, vocab)(states), rows, spec, spec.fields(5), TritonKernels())
    exact = (states.double() @ head.weight.double().t())[:, :vocab].cpu()
    want = reference(exact, rows, spec, spec.fields(5))
    for name in ("token_logprobs", "candidate_logprobs", "top_logprobs", "log_normalizer", "tail_logprob"):
        torch.testing.assert_close(got[name].cpu().double(), want[name], rtol=1e-4, atol=1e-4)
