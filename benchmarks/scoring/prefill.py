"""What the engine alone gives: prompts read, nothing asked about them. A process of its own, without our server.

    python -m benchmarks.scoring.prefill QUESTION.json ANSWER.json

vLLM is asked through its own AsyncLLM with `max_tokens=1`, all prompts at once; transformers by the model's body alone,
without its head. The answer holds the rate of each round.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks.scoring.client import random_seed
from benchmarks.scoring.work import Load

WARM_UP = 8
"""Sequences of the warm-up, whose rate says how many the first round takes."""

Read = Callable[[list[Any]], Awaitable[None]]


async def rounds(read: Read, load: Load, seconds: float, repeats: int) -> dict[str, Any]:
    """Reads rounds of about `seconds` and says how fast each one was."""
    seed = random_seed()
    await read(load.ids(seed, WARM_UP))
    rate = await _rate(read, load, seed + 1, WARM_UP)
    rates = []
    for number in range(repeats):
        count = max(WARM_UP, math.ceil(rate * seconds / load.tokens))
        rate = await _rate(read, load, seed + 2 + number, count)
        rates.append(rate)
    return {"rates": rates}


async def _rate(read: Read, load: Load, seed: int, count: int) -> float:
    ids = load.ids(seed, count)
    begun = time.monotonic()
    await read(ids)
    return count * load.tokens / (time.monotonic() - begun)


async def with_vllm(question: dict[str, Any], load: Load) -> dict[str, Any]:
    """Rounds with vLLM's engine, started with the arguments that the server gives its own."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    begun = time.monotonic()
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**question["engine_args"]))
    started = time.monotonic() - begun
    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)

    async def one(name: str, ids: Any) -> None:
        async for _ in engine.generate({"prompt_token_ids": ids.tolist()}, params, name):
            pass

    async def read(prompts: list[Any]) -> None:
        await asyncio.gather(*(one(f"{time.monotonic_ns()}-{i}", ids) for i, ids in enumerate(prompts)))

    try:
        return {**await rounds(read, load, question["seconds"], question["repeats"]), "start_s": started}
    finally:
        engine.shutdown()


async def with_transformers(question: dict[str, Any], load: Load) -> dict[str, Any]:
    """Rounds with the transformers model, in batches of the server's `batch_tokens`."""
    import torch
    from transformers import AutoModelForCausalLM

    begun = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole: Any = AutoModelForCausalLM.from_pretrained(question["model"], dtype=getattr(torch, question["dtype"]))
    body = whole.get_decoder().to(device).eval()
    started = time.monotonic() - begun
    size = max(1, question["batch_tokens"] // load.tokens)

    async def read(prompts: list[Any]) -> None:
        with torch.inference_mode():
            for first in range(0, len(prompts), size):
                batch = torch.stack([torch.from_numpy(ids).long() for ids in prompts[first : first + size]])
                body(input_ids=batch.to(device), use_cache=False)
        if device == "cuda":
            torch.cuda.synchronize()

    return {**await rounds(read, load, question["seconds"], question["repeats"]), "start_s": started}


def main() -> None:
    """Reads the question, writes the answer."""
    question = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    load = Load(**question["load"])
    way = {"vllm": with_vllm, "transformers": with_transformers}[question["backend"]]
    Path(sys.argv[2]).write_text(json.dumps(asyncio.run(way(question, load))), "utf-8")


if __name__ == "__main__":
    main()
