"""How often a model answers the task's problems right, in either mode, greedily or by sampling.

Knows a model, a tokenizer and the task; knows nothing of training or of any server.
"""

from collections.abc import Sequence
from typing import Any

import torch

from tiny_pair.task import INSTRUCTION, Problem, is_right, user_content
from tiny_pair.tokenizer import render_prompt

MAX_NEW_TOKENS = {True: 48, False: 8}
"""Per mode (thinking or not): more than any right completion has."""


@torch.inference_mode()
def complete(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, sample: bool, batch_size: int = 1024
) -> list[str]:
    """The text of one completion a prompt, without special tokens."""
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(list(prompts[start : start + batch_size]), return_tensors="pt", padding=True)
        ids_BT = batch["input_ids"].to(model.device)
        output_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=batch["attention_mask"].to(model.device),
            do_sample=sample,
            max_new_tokens=max_new_tokens,
            **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}),
        )
        texts += tokenizer.batch_decode(output_BT[:, ids_BT.shape[1] :], skip_special_tokens=True)
    return texts


def accuracy(model: Any, tokenizer: Any, problems: Sequence[Problem], *, thinking: bool, sample: bool = False) -> float:
    """The share of `problems` that one completion each answers right."""
    was_training = model.training
    model.eval()
    prompts = [render_prompt(user_content(INSTRUCTION, problem.expression), thinking=thinking) for problem in problems]
    texts = complete(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS[thinking], sample=sample)
    model.train(was_training)
    return sum(is_right(text, problem.answer) for text, problem in zip(texts, problems, strict=True)) / len(problems)
