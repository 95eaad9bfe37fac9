"""Holds the memory estimates of student_trainer/memory against what a training step and rollouts really take.

    python benchmarks/memory.py [--shape Qwen3-0.6B ...] [--form full bf16 lora] [--out result.json]

Each row is one student with random weights, by its shape: `full` trains float32 weights under bfloat16 autocast,
`bf16` trains bfloat16 weights, `lora` trains adapters of rank 16 on frozen bfloat16 weights (where peft is installed).
A step is two micro-batches of sequences of equal length, forward, the stage's own loss on a random top-64, backward,
and fused AdamW; with activation checkpointing (`recompute`) and without. `stage 1` is forward KL and cross-entropy,
`stage 2` reverse KL on completions; `sampling` is the project's continuous engine with the optimiser's states in place.
Columns are GiB: the estimate, the largest amount that PyTorch had allocated, and the second over the first.

Without a GPU it runs tiny shapes, for a dry run: allocations are then counted tensor by tensor, and the loss takes
another way than on a GPU, so that ratios say less.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.allocations import Allocations
from student_trainer import packing
from student_trainer.batches import Row, completion_ids
from student_trainer.config import NonPolicyDistillation, PolicyDistillation
from student_trainer.losses import TeacherTargets
from student_trainer.memory.shapes import KNOWN, Shape
from student_trainer.memory.student import Setup, student_memory
from student_trainer.objective_forward import accept_objective
from student_trainer.rollouts.continuous import ContinuousEngine
from student_trainer.stage_loss import StageLoss

GIB = 2**30
TINY = Shape("tiny", 4, 128, 4, 2, 32, 384, 320, True, 4096)
FORMS = ("full", "bf16", "lora")


def student(shape: Shape, setup: Setup, device: torch.device) -> Any:
    """A model of `shape` with random weights that accepts an objective, ready to train as `setup` says."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocab, tie_word_embeddings=shape.tied, max_position_embeddings=shape.positions,
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if setup.weight_bytes == 2 else torch.float32)
    try:
        with device:
            model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    if setup.lora_rank:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=setup.lora_rank, lora_alpha=32, target_modules="all-linear"))
    if setup.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        if setup.lora_rank:
            model.enable_input_require_grads()
    return packing.set_up(accept_objective(model.train()), "auto")


def said(tokens: torch.Tensor, top_k: int, temperature: float, vocab: int) -> TeacherTargets:
    """A random teacher's top-k of int64[N] tokens, with a tail of a twentieth."""
    n, device = len(tokens), tokens.device
    ids = (torch.arange(top_k, device=device)[None] * 7 + torch.arange(n, device=device)[:, None]) % vocab
    logprobs = torch.randn(n, top_k, device=device).log_softmax(-1) - 0.1
    normalizer = (logprobs / temperature).logsumexp(-1) + 0.05
    tail = torch.full((n,), float(np.log(-np.expm1(-0.05))), device=device)
    return TeacherTargets(ids, logprobs, normalizer, tail, temperature, tokens, logprobs[:, 0].contiguous())


class Meter:
    """The largest amount of memory that was allocated since it was reset, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.counter = Allocations()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Counts where PyTorch does not do so itself."""
        with contextlib.nullcontext() if self.cuda else self.counter:
            yield

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            self.counter.reset()

    def peak(self) -> float:
        return float(torch.cuda.max_memory_allocated() if self.cuda else self.counter.peak)


def measure(shape: Shape, setup: Setup, device: torch.device, new_tokens: int) -> Iterator[tuple[str, float, float]]:
    """(what, estimated bytes, measured bytes) of both stages' steps and of sampling."""
    meter = Meter(device)
    with meter.counting():
        torch.manual_seed(0)
        model = student(shape, setup, device)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        rng = np.random.default_rng(0)
        ids = rng.integers(0, shape.vocab, (setup.sequences, setup.length)).astype(np.int32)
        rows = [Row(row, setup.length - setup.completion) for row in ids]
        tokens = torch.from_numpy(completion_ids(rows)).to(device)
        stages = {
            "stage 1": StageLoss.off_policy(NonPolicyDistillation(top_k=setup.top_k), shape.vocab),
            "stage 2": StageLoss.on_policy(PolicyDistillation(top_k=setup.top_k), shape.vocab),
        }
        autocast: Callable[[], Any] = contextlib.nullcontext
        if setup.autocast:
            autocast = lambda: torch.autocast(device.type, torch.bfloat16)  # noqa: E731

        def step(loss: StageLoss) -> None:
            for _ in range(setup.accumulation):
                targets = said(tokens, setup.top_k, loss.temperature, shape.vocab)
                inputs = packing.forward_inputs(model, rows, 0, device)
                with autocast():
                    value, _ = model(**inputs, objective=loss.on(targets))
                (value / (len(tokens) * setup.accumulation)).backward()
                del value, targets, inputs
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        expected = student_memory(shape, replace(setup, slots=0)).peak
        for name, loss in stages.items():
            step(loss)
            meter.reset()
            step(loss)
            yield name, expected, meter.peak()
        engine = ContinuousEngine(model, vocab_size=shape.vocab, eos_ids=(0,), pad_id=0, slots=setup.slots)
        prompts = [rng.integers(1, shape.vocab, setup.sampled_length - new_tokens).astype(np.int32)] * setup.slots
        meter.reset()
        with autocast():
            for _ in engine.sample(prompts, max_new_tokens=new_tokens, temperature=1.0, seed=0):
                pass
        sampling = replace(setup, completion=new_tokens)
        yield "sampling", student_memory(shape, sampling).moments["sampling"], meter.peak()


def cases(a: argparse.Namespace) -> Iterator[tuple[Shape, str, Setup]]:
    """What is measured: shapes, forms, with and without recomputation; without, on half the sequences."""
    for name in a.shape:
        shape = TINY if name == "tiny" else KNOWN[f"Qwen/{name}"]
        for form in a.form:
            if form == "lora" and find_spec("peft") is None:
                print("no adapters: peft is not installed", flush=True)
                continue
            for recompute in (True, False):
                sequences = a.sequences if recompute else max(1, a.sequences // 2)
                yield (
                    shape,
                    form,
                    Setup(
                        weight_bytes=4 if form == "full" else 2,
                        frozen_bytes=2,
                        autocast=form == "full",
                        checkpointing=recompute,
                        lora_rank=16 if form == "lora" else 0,
                        sequences=sequences,
                        length=a.length,
                        completion=a.length - a.length // 8,
                        accumulation=2,
                        slots=a.slots,
                        sampled_length=a.length // 2,
                        top_k=16 if name == "tiny" else 64,
                    ),
                )


def main() -> None:
    """Measures every case, prints a line for each, and writes all as JSON where asked."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ["Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B"]
    parser.add_argument("--shape", nargs="+", default=shapes if gpu else ["tiny"], metavar="NAME")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--sequences", type=int, default=4 if gpu else 2)
    parser.add_argument("--length", type=int, default=2048 if gpu else 256)
    parser.add_argument("--slots", type=int, default=32 if gpu else 8)
    parser.add_argument("--new-tokens", type=int, default=96 if gpu else 8)
    parser.add_argument("--seconds", type=float, default=330, help="start no further case after this time")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    device = torch.device("cuda" if gpu else "cpu")
    where = torch.cuda.get_device_name() if gpu else "CPU"
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    print(where, versions, flush=True)
    print(
        f"{'student':12} {'form':5} {'recompute':9} {'what':9} {'estimate':>9} {'measured':>9} {'ratio':>6}", flush=True
    )
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    for shape, form, setup in cases(a):
        if time.monotonic() - began > a.seconds:
            print("time is up", flush=True)
            break
        about = {"student": shape.name, "form": form, "recompute": setup.checkpointing, "sequences": setup.sequences}
        yes = "yes" if setup.checkpointing else "no"
        try:
            for what, expected, found in measure(shape, setup, device, a.new_tokens):
                rows.append({**about, "what": what, "estimate_gib": expected / GIB, "measured_gib": found / GIB})
                name = shape.name.rpartition("/")[2]
                print(
                    f"{name:12} {form:5} {yes:9} {what:9} {expected / GIB:9.3f} {found / GIB:9.3f}"
                    f" {found / expected:6.2f}",
                    flush=True,
                )
        except torch.cuda.OutOfMemoryError as error:
            peak = student_memory(shape, setup).peak / GIB
            rows.append({**about, "failed": str(error).splitlines()[0][:200], "estimate_gib": peak})
            print(f"{shape.name} {form} recompute {yes}: out of memory, estimate {peak:.1f} GiB", flush=True)
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
    ratios = [r["measured_gib"] / r["estimate_gib"] for r in rows if "failed" not in r]
    if ratios:
        print(f"measured over estimate: {min(ratios):.2f} to {max(ratios):.2f}, {time.monotonic() - began:.0f} s")
    if a.out:
        settings = {**vars(a), "out": None}
        a.out.write_text(
            json.dumps({"about": {"device": where, "versions": versions, **settings}, "rows": rows}, indent=1) + "\n",
            "utf-8",
        )


if __name__ == "__main__":
    main()
