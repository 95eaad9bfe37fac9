"""What continuous batching gains over padded batches: the same rollouts of the embedded pair, by three engines in turn.

    python benchmarks/rollouts.py [--model tiny_pair/student_base] [--prompts 192] [--rows 32] [--rounds 3]

Half of the prompts are thinking ones, whose completions are many times as long. `padded` is transformers' generate in
batches of --rows, sorted by prompt; `continuous` is the trainer's default with as many slots; `generate_batch` is
transformers' own continuous batching, which gives no row its own random numbers and so samples others. Engines take
turns in every round, and the fastest round of each counts.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protos.scores import Ids, Message, Mode
from student_trainer.models import eos_ids
from student_trainer.modes import render
from student_trainer.rollouts import in_order
from student_trainer.rollouts.continuous import ContinuousEngine
from student_trainer.rollouts.padded import PaddedEngine

ROOT = Path(__file__).resolve().parent.parent


def prompts_of(tokenizer: Any, count: int) -> list[Ids]:
    """The first prompts of the held-out problems, thinking and non-thinking in turn."""
    records = json.loads((ROOT / "dataset" / "arithmetic_heldout.json").read_text())[:count]
    texts = ["\n".join(t for t in (r["instruction"], r.get("input", "")) if t) for r in records]
    return [render(tokenizer, (Message("user", t),), list(Mode)[i % 2]) for i, t in enumerate(texts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "tiny_pair" / "student_base"))
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = prompts_of(tokenizer, args.prompts)
    same = {
        "vocab_size": len(tokenizer),
        "eos_ids": eos_ids(model.generation_config, tokenizer),
        "pad_id": tokenizer.pad_token_id,
    }
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": 1}

    def padded() -> list[int]:
        engine = PaddedEngine(model, slots=args.rows, **same)
        return [len(r.completion_ids) for r in in_order(engine, prompts, **options)]

    def continuous() -> list[int]:
        engine = ContinuousEngine(model, slots=args.rows, **same)
        return [len(r.completion_ids) for r in in_order(engine, prompts, **options)]

    def generate_batch() -> list[int]:
        from transformers import ContinuousBatchingConfig

        kept = model.config._attn_implementation
        config = GenerationConfig(
            do_sample=True,
            temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
            top_k=0,
            eos_token_id=list(same["eos_ids"]),
            pad_token_id=same["pad_id"],
        )
        batching = ContinuousBatchingConfig(
            max_requests_per_batch=args.rows, num_blocks=args.rows * 2, max_batch_tokens=2048, seed=1
        )
        try:
            found = model.generate_batch([p.tolist() for p in prompts], config, batching)
        finally:
            model.set_attn_implementation(kept)
        if len(found) < len(prompts):
            raise RuntimeError(f"{len(found)} of {len(prompts)} prompts were answered")
        return [len(o.generated_tokens) for o in found.values()]

    engines: list[Callable[[], list[int]]] = [padded, continuous, generate_batch]
    best: dict[str, tuple[float, list[int], int]] = {}
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    model.register_forward_pre_hook(count)
    for turn in range(args.rounds + 1):  # the first round warms up
        for engine in list(engines):
            started, passes = time.process_time(), 0
            try:
                lengths = engine()
            except Exception as error:  # noqa: BLE001 - a release whose own batching fails here is a result too
                print(f"{engine.__name__}: {type(error).__name__}: {error}")
                engines.remove(engine)
                continue
            seconds = time.process_time() - started
            if turn and (engine.__name__ not in best or seconds < best[engine.__name__][0]):
                best[engine.__name__] = (seconds, lengths, passes)
    for name, (seconds, lengths, made) in best.items():
        halves = [sum(lengths[i::2]) / len(lengths[i::2]) for i in range(2)]
        speed, ratio = sum(lengths) / seconds, best["padded"][0] / seconds
        print(
            f"{name:15} {seconds:7.2f} s  {speed:6.0f} tokens/s  {ratio:5.2f} x padded  {made:4} passes  "
            f"mean length {halves[0]:.0f} and {halves[1]:.0f}, longest {max(lengths)}"
        )


if __name__ == "__main__":
    main()
