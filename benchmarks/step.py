"""What a training step costs on one GPU: tokens/s and peak memory, beside the same step with other libraries' losses.

    python benchmarks/step.py [--shape qwen3-8b|qwen3-1.7b|tiny ...] [--sequences 4] [--length 2048] [--out result.json]

A step is forward, loss, backward and AdamW on sequences of one length, with activation checkpointing and bfloat16. The
model has random weights of the named shape: Qwen3-8B with LoRA (rank 16 on all linear layers, base in bfloat16),
Qwen3-1.7B whole (weights in float32, autocast). What the teacher said lies ready on the GPU, in the form that the loss
wants: no teacher runs. The losses are

- `top-64`: the project's forward KL over the teacher's top 64 and the tail,
- `full`: the project's JSD over the whole distribution, from the teacher's hidden states and its head,
- `TRL`: `generalized_jsd_loss` of its GKD trainer on whole logits, the teacher's computed from the same hidden states,
- `Liger`: its fused linear JSD loss on the same,

the last two where these packages are installed. All four see the completion's positions alone. Small on a CPU, for a
dry run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.loss import GIB, teacher_targets
from student_trainer import packing
from student_trainer.batches import Row, completion_ids
from student_trainer.losses import FullTargets, Head, Objective, distillation_loss
from student_trainer.objective_forward import accept_objective

PROMPT = 64
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 151_936, "tie_word_embeddings": False,
    },
    "qwen3-1.7b": {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "vocab_size": 151_936, "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1024, "tie_word_embeddings": True,
    },
}  # fmt: skip
ADAPTED = {"qwen3-8b"}
LossOf = Callable[[Tensor, Any], Tensor]
"""(hidden [N,H], LM head module) -> the mean loss."""


def student(shape: str, device: torch.device) -> Any:
    """A model with random weights that accepts an objective; with adapters on a shape too large to train whole."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**SHAPES[shape], head_dim=128 if shape != "tiny" else 16, max_position_embeddings=40960)
    adapted = shape in ADAPTED
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if adapted else torch.float32)
    try:
        with device:
            model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    if adapted:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if adapted:
        model.enable_input_require_grads()
    return packing.set_up(accept_objective(model.train()), "auto")


class Losses:
    """The losses on N positions of a batch, as functions of hidden states and LM head."""

    def __init__(self, model: Any, tokens: Tensor, a: argparse.Namespace) -> None:
        head = model.get_output_embeddings().weight.detach()
        self.tokens, self.a, self.n = tokens, a, len(tokens)
        self.real = min(a.vocab, int(head.shape[0]))
        generator = torch.Generator(head.device).manual_seed(1)
        dtype = torch.bfloat16 if head.is_cuda else torch.float32
        self.teacher_head = torch.empty_like(head, dtype=dtype).normal_(0, 0.02, generator=generator)
        hidden = torch.empty(self.n, head.shape[1], dtype=dtype, device=head.device)
        self.teacher_hidden = hidden.normal_(generator=generator)

    def ready(self) -> dict[str, Callable[[], LossOf]]:
        """Losses by name; each function lays out what the teacher said and gives the loss."""
        return {"top-64": self.top_k, "full": self.full, "TRL": self.trl, "Liger": self.liger}

    def top_k(self) -> LossOf:
        """The project's, on a support."""
        k, t = min(64, self.real), self.a.temperature
        said = teacher_targets(self.teacher_hidden, self.teacher_head, self.tokens, k, t, self.real)
        self.teacher_head = self.teacher_hidden = self.teacher_head.new_empty(0)
        return self._ours(said, Objective("forward_kl"))

    def full(self) -> LossOf:
        """The project's, on the whole distribution."""
        head = Head(self.teacher_head[: self.real])
        return self._ours(FullTargets(self.teacher_hidden, head, self.a.temperature), Objective("jsd"))

    def _ours(self, said: Any, objective: Objective) -> LossOf:
        def loss(hidden: Tensor, head: Any) -> Tensor:
            whole = Head(head.weight, None, self.real)
            return distillation_loss(hidden, whole, said, objective, validate=False).loss / self.n

        return loss

    def trl(self) -> LossOf:
        """TRL's, on whole logits."""
        from trl.experimental.gkd.gkd_trainer import GKDTrainer

        def loss(hidden: Tensor, head: Any) -> Tensor:
            mine = torch.nn.functional.linear(hidden, head.weight)[None]
            with torch.no_grad():
                theirs = (self.teacher_hidden @ self.teacher_head.T)[None]
            found: Tensor = GKDTrainer.generalized_jsd_loss(
                mine, theirs, beta=0.5, temperature=self.a.temperature, num_items_in_batch=self.n
            )
            return found

        return loss

    def liger(self) -> LossOf:
        """Liger's, from hidden states and heads."""
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

        fused = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, temperature=self.a.temperature
        )

        def loss(hidden: Tensor, head: Any) -> Tensor:
            weight = head.weight.to(torch.bfloat16)
            found: Tensor = fused(
                hidden.to(torch.bfloat16), weight, self.teacher_hidden, self.teacher_head, self.tokens
            )
            return found

        return loss


def has(package: str) -> bool:
    """Whether a package is installed."""
    try:
        importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def measure(shape: str, name: str, a: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds a step (median), tokens/s and peak memory of one loss."""
    torch.manual_seed(0)
    model = student(shape, device)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, min(a.vocab, SHAPES[shape]["vocab_size"]), (a.sequences, a.length)).astype(np.int32)
    rows = [Row(row, min(PROMPT, a.length // 2)) for row in ids]
    inputs = packing.forward_inputs(model, rows, 0, device)
    loss = Losses(model, torch.from_numpy(completion_ids(rows)).to(device), a).ready()[name]()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()

    def step() -> float:
        with autocast:
            value = model(**inputs, objective=loss)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(value.detach())

    values = [step() for _ in range(2)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(a.repeats):
        began = time.perf_counter()
        values.append(step())
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times)
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0
    return {
        "loss": name,
        "tokens_per_second": ids.size / seconds,
        "seconds": seconds,
        "peak_gib": peak,
        "value": values[0],
    }


def main() -> None:
    """Measures every loss on every shape, prints a table, and writes it as JSON where asked."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["qwen3-8b", "qwen3-1.7b"] if gpu else ["tiny"])
    parser.add_argument("--loss", nargs="+", choices=["top-64", "full", "TRL", "Liger"])
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048 if gpu else 96)
    parser.add_argument("--vocab", type=int, default=151_669 if gpu else 1000)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=5 if gpu else 2)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    device = torch.device("cuda" if gpu else "cpu")
    where = torch.cuda.get_device_name() if gpu else "CPU"
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "liger-kernel") if has(name)
    }
    print(where, versions, vars(a), flush=True)
    print(f"{'shape':12} {'loss':8} {'tokens/s':>10} {'s/step':>8} {'peak GiB':>9} {'value':>8}", flush=True)
    names = a.loss or ["top-64", "full", *(n for n, p in (("TRL", "trl"), ("Liger", "liger_kernel")) if has(p))]
    rows: list[dict[str, Any]] = []
    for shape in a.shape:
        for name in names:
            try:
                found = measure(shape, name, a, device)
            except torch.cuda.OutOfMemoryError as error:
                found = {"loss": name, "failed": str(error).splitlines()[0]}
            rows.append({"shape": shape, **found})
            if "failed" in found:
                print(f"{shape:12} {name:8} {found['failed'][:90]}", flush=True)
            else:
                print(
                    f"{shape:12} {name:8} {found['tokens_per_second']:10,.0f} {found['seconds']:8.3f} "
                    f"{found['peak_gib']:9.2f} {found['value']:8.4f}",
                    flush=True,
                )
            gc.collect()
            if gpu:
                torch.cuda.empty_cache()
    if a.out:
        about = {"device": where, "versions": versions, **vars(a), "out": None}
        a.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
