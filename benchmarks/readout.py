"""What the read-out costs beside the LM head: microseconds a row, for the questions that trainers ask.

    python benchmarks/readout.py [--rows 16384] [--hidden 4096] [--width 151936] [--vocab 151669] [--profile]

For each question: the head's product alone, then with the plain formulas after it, with PyTorch's blocks, and with
the kernels that `readout_check.choose` finds for the device, all in chunks of the same number of rows. Before that the
results are compared with float64. Random weights; on a CPU small sizes are the default, for a dry run.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protos.scores import ScoreSpec
from teacher_server.backends import readout_check
from teacher_server.backends.readout import HeadFn, Rows, chunk_rows, float_head, read_chunk
from teacher_server.backends.readout_blocks import TORCH, Kernels

CASES = [
    (ScoreSpec(64), 0),
    (ScoreSpec(64, (1.0, 2.0)), 0),
    (ScoreSpec(64), 64),
    (ScoreSpec(0), 64),
    (ScoreSpec(1), 0),
    (ScoreSpec(256), 0),
    (ScoreSpec(1024), 0),
]
Read = Callable[[Tensor, Rows, ScoreSpec], object]


def name_of(spec: ScoreSpec, candidates: int) -> str:
    return f"K={spec.top_k} M={len(spec.temperatures)} C={candidates}"


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The fastest of some runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def through(states: Tensor, head: HeadFn, chunk: int, rows: Rows, spec: ScoreSpec, read: Read | None) -> None:
    """All rows, a chunk at a time."""
    for first in range(0, len(states), chunk):
        part = slice(first, first + chunk)
        logits = head(states[part])
        if read is not None:
            candidates = None if rows.candidates is None else rows.candidates[part]
            read(logits, Rows(rows.targets[part], candidates), spec)


def plain(logits: Tensor, rows: Rows, spec: ScoreSpec) -> object:
    candidates = 0 if rows.candidates is None else rows.candidates.shape[1]
    return readout_check.reference(logits, rows, spec, spec.fields(candidates))


def blocks(kernels: Kernels) -> Read:
    def read(logits: Tensor, rows: Rows, spec: ScoreSpec) -> object:
        candidates = 0 if rows.candidates is None else rows.candidates.shape[1]
        return read_chunk(logits, rows, spec, spec.fields(candidates), kernels)

    return read


def worst_errors(logits: Tensor, rows: Rows, spec: ScoreSpec, kernels: Kernels) -> str:
    """The largest difference of each field from float64; of ids, that of the logits that they name."""
    fields = spec.fields(0 if rows.candidates is None else rows.candidates.shape[1])
    want = readout_check.reference(logits.double(), rows, spec, fields)
    got = read_chunk(logits.clone(), rows, spec, fields, kernels)
    words = []
    for name, expected in want.items():
        values = got[name]
        if name == "top_token_ids":
            values, expected = logits.gather(1, values.long()), logits.gather(1, expected)
        words.append(f"{name} {float((values.double() - expected.double()).abs().max()):.1e}")
    return ", ".join(words)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384 if cuda else 64)
    parser.add_argument("--hidden", type=int, default=4096 if cuda else 64)
    parser.add_argument("--width", type=int, default=151_936 if cuda else 20_032, help="rows of the LM head")
    parser.add_argument("--vocab", type=int, default=0, help="real ids; default is 267 fewer than --width, as Qwen3's")
    parser.add_argument("--chunk", type=int, default=0, help="rows of a chunk; default is the product's own")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="also print the GPU's kernels for the first question")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    vocab = arguments.vocab or arguments.width - 267
    chunk = arguments.chunk or min(arguments.rows, chunk_rows(vocab, device))
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(arguments.hidden, arguments.width, bias=False, device=device, dtype=dtype)
    states = torch.randn(arguments.rows, arguments.hidden, generator=generator)
    states = (states * torch.logspace(0, 1.3, arguments.rows)[:, None]).to(device, dtype)  # flat rows to sharp ones
    logits_of = float_head(head, vocab)
    with torch.inference_mode():
        kernels = readout_check.choose(device, vocab)
        where = torch.cuda.get_device_name(device) if cuda else "CPU"
        print(f"{where}, torch {torch.__version__}, kernels {type(kernels).__name__}")
        print(
            f"{arguments.rows} rows in chunks of {chunk}, hidden {arguments.hidden}, {vocab} of {arguments.width} ids"
        )
        asked = torch.randint(vocab, (arguments.rows, 65), generator=generator).to(device)
        few = slice(0, None, max(1, arguments.rows // 16))
        some = logits_of(states[few])
        print("\nlargest difference from float64")
        for spec, c in CASES:
            rows = Rows(asked[few, 0], asked[few, 1 : c + 1] if c else None)
            print(f"  {name_of(spec, c)}: {worst_errors(some, rows, spec, kernels)}")
        del some

        def cost(rows: Rows, spec: ScoreSpec, read: Read | None) -> float:
            run = lambda: through(states, logits_of, chunk, rows, spec, read)  # noqa: E731
            return seconds(run, device, arguments.repeats) / arguments.rows * 1e6

        alone = cost(Rows(asked[:, 0], None), CASES[0][0], None)
        print(f"\nthe head alone: {alone:.3f} us a row; the read-outs add")
        print("| question | plain formulas | PyTorch's blocks | chosen kernels | head + chosen over head |")
        print("|---|---|---|---|---|")
        for spec, c in CASES:
            rows = Rows(asked[:, 0], asked[:, 1 : c + 1] if c else None)
            added = [cost(rows, spec, read) - alone for read in (plain, blocks(TORCH), blocks(kernels))]
            cells = " | ".join(f"{us:.3f} us" for us in added)
            print(f"| {name_of(spec, c)} | {cells} | {(alone + added[2]) / alone:.3f} |", flush=True)
        if arguments.profile:
            rows = Rows(asked[:, 0], None)
            activities = [torch.profiler.ProfilerActivity.CPU]
            if cuda:
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            with torch.profiler.profile(activities=activities) as profile:
                through(states, logits_of, chunk, rows, CASES[0][0], blocks(kernels))
            by = "self_cuda_time_total" if cuda else "self_cpu_time_total"
            print(profile.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=70))


if __name__ == "__main__":
    main()
