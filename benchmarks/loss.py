"""What the loss of a step costs: milliseconds and memory, beside a plain cross-entropy of the same shape.

    python benchmarks/loss.py [--positions 16384] [--hidden 4096] [--width 151936] [--vocab 151669] [--top-k 64]
                              [--out result.json]

Each row is one forward and backward of a loss from hidden states to the gradients of hidden states and LM head (or of
hidden states alone where the head is frozen, as with LoRA). `plain` is the product with the head and
torch.nn.functional.cross_entropy in float32, whatever memory that takes. `extra` is the peak of allocated memory above
what is there before, less the gradients that stay; `again` the same in a second micro-batch, where the head's gradient
is added to one that is there, so that the new one counts as extra.
`error` is that of the gradients by hidden states and head in 512 positions, relative to
float32's on whole logits, by norm. Random numbers; small sizes on a CPU, for a dry run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from student_trainer.losses import (
    FullTargets,
    Head,
    Objective,
    TeacherTargets,
    cross_entropy,
    distillation_loss,
    full_divergence,
    reference_loss,
)
from student_trainer.losses import fused as fused_module

GIB = 2**30
CHECKED = 512
Step = Callable[[Tensor, Tensor], Tensor]
"""(hidden [N,H], head [V,H]) -> loss."""


def cases(top_k: int) -> dict[str, Objective]:
    """The project's losses by name."""
    return {
        "forward KL": Objective("forward_kl"),
        "forward KL and cross-entropy": Objective("forward_kl", alpha=0.7, beta=0.3),
        "reverse KL": Objective("reverse_kl"),
        "JSD": Objective("jsd"),
        "reverse KL, student's support": Objective("reverse_kl_sampled_tail"),
        "policy gradient": Objective("policy_gradient"),
        "full forward KL": Objective("forward_kl"),
        "full reverse KL": Objective("reverse_kl"),
        "full JSD": Objective("jsd"),
    }


def teacher_targets(
    hidden: Tensor, head: Tensor, tokens: Tensor, top_k: int, temperature: float, vocab: int
) -> TeacherTargets:
    """What a teacher with these hidden states [N,H] and head [V,H] says of int64[N] tokens."""
    parts = []
    for some, ids in zip(hidden.split(512), tokens.split(512), strict=True):
        logprobs = (some @ head.T)[:, :vocab].float().log_softmax(-1)
        at_t = logprobs / temperature
        top = logprobs.topk(top_k, -1).indices
        tail = at_t.log_softmax(-1).scatter(1, top, -torch.inf).logsumexp(-1)
        token = logprobs.gather(1, ids[:, None])[:, 0]
        parts.append((top, logprobs.gather(1, top), at_t.logsumexp(-1), tail, token))
    top, logprobs, normalizer, tail, token = (torch.cat(column) for column in zip(*parts, strict=True))
    return TeacherTargets(top, logprobs, normalizer, tail, temperature, tokens, token)


class Bench:
    """Inputs of one shape, and the rows measured on them."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.device = a, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        generator = torch.Generator(self.device).manual_seed(0)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            made = torch.empty(*shape, dtype=self.dtype, device=self.device)
            return made.normal_(0, scale, generator=generator)

        self.hidden = random(a.positions, a.hidden)
        self.head = random(a.width, a.hidden, scale=2 / a.hidden**0.5)
        self.teacher_hidden = (self.hidden + random(a.positions, a.hidden) / 2).to(self.dtype)
        self.tokens = torch.randint(a.vocab, (a.positions,), device=self.device, generator=generator)

    def targets(self, name: str, n: int) -> TeacherTargets | FullTargets:
        """The teacher's word on the first n positions: another model with the same head."""
        t, k = self.a.temperature, 0 if name == "policy gradient" else self.a.top_k
        if name.startswith("full"):
            head = Head(self.head[: self.a.vocab].detach())
            return FullTargets(self.teacher_hidden[:n], head, t, self.tokens[:n])
        tokens = self.tokens[:n]
        return teacher_targets(self.teacher_hidden[:n], self.head, tokens, k, t, self.a.vocab)

    def plain(self, hidden: Tensor, head: Tensor) -> Tensor:
        """A cross-entropy as models of transformers compute it."""
        return torch.nn.functional.cross_entropy((hidden @ head.T).float(), self.tokens[: len(hidden)], reduction="sum")

    def ours(self, objective: Objective, targets: TeacherTargets | FullTargets, chunk: int | None = None) -> Step:
        """The project's loss as a step."""

        def step(hidden: Tensor, head: Tensor) -> Tensor:
            whole = Head(head, None, self.a.vocab)
            return distillation_loss(hidden, whole, targets, objective, chunk_size=chunk, validate=False).loss

        return step

    def naive(self, objective: Objective, targets: TeacherTargets | FullTargets) -> Step:
        """The formulas on whole logits, gradients by autograd."""

        def step(hidden: Tensor, head: Tensor) -> Tensor:
            logits = hidden @ head.T
            if isinstance(targets, FullTargets):
                teacher = targets.hidden_NW.to(logits.dtype) @ targets.head.weight_VH.to(logits.dtype).T
                soft = full_divergence(logits, teacher, objective.loss, targets.temperature, vocab_size=self.a.vocab)
                hard = objective.beta and objective.beta * cross_entropy(logits, targets.token_ids_N, self.a.vocab)
                return (objective.alpha * soft + hard).sum()
            return reference_loss(logits, targets, objective, vocab_size=self.a.vocab)[0]

        return step

    def measure(self, step: Step, frozen: bool) -> dict[str, float]:
        """Milliseconds (median, lowest) and GiB of a step."""
        hidden, head = self.hidden.clone().requires_grad_(), self.head.detach().requires_grad_(not frozen)
        inputs = [hidden] if frozen else [hidden, head]
        gradients = sum(i.numel() * i.element_size() for i in inputs)
        found: dict[str, float] = {}
        for name, kept in (("extra", gradients), ("again", hidden.numel() * hidden.element_size())):
            hidden.grad = None
            head.grad = None if name == "extra" else head.grad
            base = self._peak(lambda: None)
            found[name] = (self._peak(lambda: step(hidden, head).backward()) - base - kept) / GIB
        times = []
        for _ in range(self.a.repeats + 1):
            hidden.grad = head.grad = None
            self._wait()
            began = time.perf_counter()
            step(hidden, head).backward()
            self._wait()
            times.append(1000 * (time.perf_counter() - began))
        return {**found, "ms": statistics.median(times[1:]), "lowest_ms": min(times[1:])}

    def error(self, step: Step, exact: Step, frozen: bool) -> float:
        """Of the gradients of the first CHECKED positions, by norm; the larger of hidden states and head."""
        grads = []
        for run, dtype in ((step, self.dtype), (exact, torch.float32)):
            hidden = self.hidden[:CHECKED].to(dtype, copy=True).requires_grad_()
            head = self.head.to(dtype, copy=True).requires_grad_(not frozen)
            run(hidden, head).backward()
            grads.append([hidden.grad, head.grad] if not frozen else [hidden.grad])
        return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(*grads, strict=True))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _peak(self, run: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            run()
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated())


def main() -> None:
    """Measures every loss, prints a table, and writes it as JSON where asked."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        "positions": 16384 if gpu else 600, "hidden": 4096 if gpu else 64, "width": 151_936 if gpu else 1024,
        "vocab": 151_669 if gpu else 1000, "top-k": 64, "repeats": 5 if gpu else 2,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--only", default="", help="losses whose name contains this")
    parser.add_argument("--chunked", action="store_true", help="also the way in plain PyTorch")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    bench = Bench(a)
    where = torch.cuda.get_device_name() if gpu else "CPU"
    kernels = fused_module.kernels_for(bench.device)
    print(f"{where}, torch {torch.__version__}, {bench.dtype}, kernels {type(kernels).__name__}, {vars(a)}", flush=True)
    print(f"{'loss':32} {'head':8} {'ms':>8} {'ratio':>6} {'extra':>7} {'again':>7} {'error':>8}", flush=True)
    rows = []
    for frozen in (False, True):
        base = bench.measure(bench.plain, frozen)
        for name, objective in cases(a.top_k).items():
            if a.only in name:
                targets, few = bench.targets(name, a.positions), bench.targets(name, CHECKED)
                for way, chunk in (("", None), (" (PyTorch)", 883)) if a.chunked else (("", None),):
                    small, exact = bench.ours(objective, few, chunk), bench.naive(objective, few)
                    try:
                        found = bench.measure(bench.ours(objective, targets, chunk), frozen)
                        found["error"] = bench.error(small, exact, frozen)
                    except torch.cuda.OutOfMemoryError as error:
                        print(name, "out of memory", str(error)[:80], flush=True)
                        continue
                    rows.append(row(name + way, frozen, found, base))
        rows.append(row("plain cross-entropy", frozen, base, base))
    if a.out:
        about = {"device": where, "torch": torch.__version__, "dtype": str(bench.dtype), **vars(a), "out": None}
        a.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", "utf-8")


def row(name: str, frozen: bool, found: dict[str, float], base: dict[str, float]) -> dict[str, Any]:
    """One line, printed."""
    head, ratio = "frozen" if frozen else "trains", found["ms"] / base["ms"]
    print(
        f"{name:32} {head:8} {found['ms']:8.1f} {ratio:6.2f} {found['extra']:7.2f} {found['again']:7.2f} "
        f"{found.get('error', 0):8.1e}",
        flush=True,
    )
    return {"loss": name, "head": head, "ratio": ratio, **found}


if __name__ == "__main__":
    main()
