"""How fast a stock vLLM server scores through its OpenAI interface, beside a strong2weak server of the same model.

    python -m teacher_server --backend vllm --model M --grpc-port 50051
    python -m vllm.entrypoints.openai.api_server --model M --max-logprobs 64 --port 8000
    python benchmarks/stock_scoring.py --model M --stock http://127.0.0.1:8000 --wire 127.0.0.1:50051

Both are asked for the same random sequences at top 64, by the trainer's own client, in rounds that alternate; neither
caches scores (start the teacher server with --no-cache-enabled) and each round has sequences of its own. One of
--stock and --wire may be left out. Prints a line for each: tokens/s, the best of the rounds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from protos.scores import ScoreSpec, Sequence
from student_trainer.config import Config
from student_trainer.models import describe
from student_trainer.stock_teacher import stock_model
from student_trainer.teacher_client import TeacherClient, connect


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the model, for its tokenizer and its width")
    parser.add_argument("--stock", help="address of the stock server, http://host:port")
    parser.add_argument("--wire", help="address of the strong2weak server")
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--length", type=int, default=480, help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=32, help="sequences of a round")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    """See the module."""
    options = arguments()
    student = describe(Config.model_validate({"models": {"student_model": options.model}}), Path(options.model))
    model = stock_model(student, None, None)
    clients: dict[str, TeacherClient] = {}
    if options.stock:
        clients["stock OpenAI interface"] = connect(options.stock, stock=model)
    if options.wire:
        clients["strong2weak, gRPC"] = connect(options.wire)
    draw = np.random.default_rng(0)
    best = dict.fromkeys(clients, 0.0)
    for turn in range(options.rounds + 1):  # the first warms up
        ids = draw.integers(0, model.vocab_size, (options.sequences, options.length), dtype=np.int32)
        for name, client in clients.items():
            began = time.perf_counter()
            client.score([Sequence(row) for row in ids], ScoreSpec(options.top_k))
            if turn:
                best[name] = max(best[name], ids.size / (time.perf_counter() - began))
    for name, rate in best.items():
        print(f"{name}: {rate:,.0f} tokens/s at top {options.top_k}, sequences of {options.length}")
    for client in clients.values():
        client.close()


if __name__ == "__main__":
    main()
