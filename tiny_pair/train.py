"""Train the pair from scratch: `python -m tiny_pair.train teacher|student_base`.

Knows the corpora, the architectures and how to evaluate; writes a model folder and, beside it, a training log of one
JSON object a line. Distillation happens elsewhere: nothing here looks from one model at the other.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer

from tiny_pair.corpus import Document, student_base_documents, teacher_documents
from tiny_pair.evaluate import accuracy
from tiny_pair.models import build_model
from tiny_pair.task import distinct_problems
from tiny_pair.tokenizer import save_tokenizer

SEQUENCE_LENGTH = 64
DEFAULTS: dict[str, dict[str, float]] = {
    "teacher": {"steps": 1100, "batch_size": 512, "learning_rate": 2e-3, "documents": 300_000},
    "student_base": {"steps": 2500, "batch_size": 256, "learning_rate": 3e-3, "documents": 200_000},
}
WARMUP_SHARE, FINAL_SHARE = 0.05, 0.02
"""The share of the steps that warm up, and the share of the peak learning rate at the end."""
HELD_OUT_PROBLEMS, HELD_OUT_SEED = 1024, 7


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; every number left out takes the role's default."""
    parser = argparse.ArgumentParser(prog="python -m tiny_pair.train", description=__doc__)
    parser.add_argument("role", choices=sorted(DEFAULTS))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, help="model folder; default: tiny_pair/ROLE")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--documents", type=int, help="documents drawn once, then visited at random")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="end earlier, on a shorter schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate-every", type=int, default=250)
    options = parser.parse_args(arguments)
    options.out = options.out or Path(__file__).parent / options.role
    for name, value in DEFAULTS[options.role].items():
        if getattr(options, name) is None:
            setattr(options, name, type(value)(value))
    return options


def learning_rate_at(progress: float, peak: float) -> float:
    """Linear warm-up, then a cosine down to `FINAL_SHARE` of the peak; `progress` runs from 0 to 1."""
    if progress < WARMUP_SHARE:
        return peak * progress / WARMUP_SHARE
    decay = (min(progress, 1.0) - WARMUP_SHARE) / (1 - WARMUP_SHARE)
    return peak * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * decay)))


def encode_documents(documents: Iterator[Document], count: int, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` documents as ids int16[N, L] and loss mask bool[N, L], right-padded to `SEQUENCE_LENGTH` or cut there."""
    rows: list[list[int]] = []
    silent_lengths: list[int] = []
    while len(rows) < count:
        chunk = list(islice(documents, min(10_000, count - len(rows))))
        silent = tokenizer([text for text, _ in chunk], return_attention_mask=False)["input_ids"]
        loud = tokenizer([text for _, text in chunk], return_attention_mask=False)["input_ids"]
        rows += [(before + after)[:SEQUENCE_LENGTH] for before, after in zip(silent, loud, strict=True)]
        silent_lengths += map(len, silent)
    padding = [tokenizer.pad_token_id] * SEQUENCE_LENGTH
    ids_NL = torch.from_numpy(np.array([(row + padding)[:SEQUENCE_LENGTH] for row in rows], dtype=np.int16))
    position_L = torch.arange(SEQUENCE_LENGTH)
    lengths_N1 = torch.tensor([len(row) for row in rows])[:, None]
    mask_NL = (position_L >= torch.tensor(silent_lengths)[:, None]) & (position_L < lengths_N1)
    return ids_NL, mask_NL


def next_token_loss(model: Any, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy, in nats a token, of the tokens in the mask; causality hides the padding."""
    with torch.autocast(ids_BL.device.type, torch.bfloat16, enabled=ids_BL.device.type == "cuda"):
        logits_BLV = model(input_ids=ids_BL, use_cache=False).logits[:, :-1]
    chosen = mask_BL[:, 1:]
    return torch.nn.functional.cross_entropy(logits_BLV[chosen].float(), ids_BL[:, 1:][chosen])


def round_to_bfloat16(model: Any) -> None:
    """Make every float32 weight representable in bfloat16, so that a bfloat16 teacher is the same teacher."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train one model as the options say, save it with its tokenizer, and return the last record of its log.

    The whole pool of documents lives on the device; weights are rounded to bfloat16 before the last evaluation.
    """
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(options.seed)
    save_tokenizer(options.out)
    tokenizer = AutoTokenizer.from_pretrained(options.out)
    documents = {"teacher": teacher_documents, "student_base": student_base_documents}[options.role](options.seed)
    ids_NL, mask_NL = (t.to(device) for t in encode_documents(documents, options.documents, tokenizer))
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = build_model(options.role, **special).to(device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
    held_out = distinct_problems(HELD_OUT_PROBLEMS, HELD_OUT_SEED, held_out=True)
    log = options.out.with_name(f"{options.out.name}_training.jsonl").open("w")
    began = time.monotonic()
    record: dict[str, Any] = {
        "role": options.role,
        "parameters": model.num_parameters(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **{name: getattr(options, name) for name in (*DEFAULTS[options.role], "seed")},
    }
    print(json.dumps(record), file=log, flush=True)
    done = False
    for step in range(1, options.steps + 1):
        progress = max(step / options.steps, (time.monotonic() - began) / options.max_seconds)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(progress, options.learning_rate)
        rows = torch.randint(len(ids_NL), (options.batch_size,), device=device)
        loss = next_token_loss(model, ids_NL[rows].long(), mask_NL[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = progress >= 1.0
        if done:
            round_to_bfloat16(model)
        if done or step % options.evaluate_every == 0:
            record = {"step": step, "loss": round(loss.item(), 5), "learning_rate": optimizer.param_groups[0]["lr"]}
            for sample in (False, True) if done else (False,):
                for thinking in (True, False):
                    mode = "thinking" if thinking else "non_thinking"
                    name = f"{'sampled' if sample else 'greedy'}_accuracy_{mode}"
                    record[name] = accuracy(model, tokenizer, held_out, thinking=thinking, sample=sample)
            record["seconds"] = round(time.monotonic() - began, 1)
            print(json.dumps(record), file=log, flush=True)
            print(json.dumps(record), flush=True)
        if done:
            break
    log.close()
    model.save_pretrained(options.out)
    return record


if __name__ == "__main__":
    train(parse_arguments())
