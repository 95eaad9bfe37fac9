"""Whether a stock server's tokenizer is the expected one: what it makes of fixed texts, and of every id.

Two tokenizers that agree on all of this may still differ in what no text here meets. Servers have /tokenize and
/detokenize for it; one without them is refused, because ids that mean other tokens train silently on nonsense.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from protos import errors
from student_trainer.teacher_client.openai_model import StockModel

PROBES = (
    "The quick brown fox jumps over the lazy dog. It's 12:34:56, isn't it?\n\n\tIndented\r\n  twice   \n",
    "def f(x_0: int) -> list[str]:\n    return [f'{i:>4}' for i in range(x_0)]  # ünïcödé\n",
    "1234567890 3.14159e-10 -42 x²+y²=z² ½ ∑∫√ ≤ ≠ → $\\frac{a}{b}$",
    "语言模型的蒸馏。日本語のテキスト、한국어 텍스트, العربية, हिन्दी, Ελληνικά, עברית, русский",
    "🙂👩‍👩‍👧‍👦🇩🇪 e\u0301 \u00e9 \ufb01 \u200b\u00a0\u3000",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nHello<|im_end|><|endoftext|>",
)
"""Texts of many kinds: prose, code, numbers, scripts, emoji, white space, and a conversation with special tokens."""
CHUNK = 8192
"""Ids of one call of /detokenize."""

Ask = Callable[[str, str, Any], Any]


def check_tokenizer(ask: Ask, model: StockModel, served: str, address: str) -> None:
    """TeacherMismatch naming the first difference; Unsupported where the server cannot be asked."""
    for text in PROBES:
        given = _call(ask, "/tokenize", {"model": served, "prompt": text, "add_special_tokens": False}, address)
        theirs, ours = given.get("tokens"), list(model.encode(text))
        if theirs != ours:
            at, there, here = _first_difference(list(theirs or []), ours)
            raise errors.TeacherMismatch(
                f"{address} has another tokenizer than the student: of {text!r} its token {at} is {there}, the "
                f"student's {here}; use a student of the teacher's family, with the same tokenizer files"
            )
    for first in range(0, model.vocab_size, CHUNK):
        _check_ids(ask, model, served, address, range(first, min(first + CHUNK, model.vocab_size)))


def _check_ids(ask: Ask, model: StockModel, served: str, address: str, ids: range) -> None:
    """Compares the text of all `ids`; where it differs, halves them until the id at fault is found."""
    answer = _call(ask, "/detokenize", {"model": served, "tokens": list(ids)}, address)
    theirs = answer.get("prompt", answer.get("text"))  # vLLM's name, SGLang's name
    expected = {model.decode(ids, skip) for skip in (False, True)}
    if theirs in expected:
        return
    if len(ids) > 1:
        middle = len(ids) // 2
        _check_ids(ask, model, served, address, ids[:middle])
        _check_ids(ask, model, served, address, ids[middle:])
    raise errors.TeacherMismatch(
        f"{address} has another tokenizer than the student: the token id {ids[0]} is {theirs!r} there and "
        f"{model.decode(ids, False)!r} here; use a student of the teacher's family, with the same tokenizer files"
    )


def _call(ask: Ask, path: str, body: dict[str, Any], address: str) -> dict[str, Any]:
    try:
        answer = ask("POST", path, body)
    except errors.Unsupported as error:
        raise errors.Unsupported(
            f"{address} has no {path}, so that its tokenizer cannot be compared with the student's ({error.message}); "
            "use vLLM, SGLang 0.5.5 or later, or a strong2weak teacher"
        ) from error
    if not isinstance(answer, dict):
        raise errors.TeacherFailed(f"{address} answers {path} with no object")
    return answer


def _first_difference(theirs: list[Any], ours: list[int]) -> tuple[int, Any, Any]:
    pairs = enumerate(zip(theirs, ours, strict=False))
    at = next((i for i, (there, here) in pairs if there != here), min(len(theirs), len(ours)))
    return at, theirs[at] if at < len(theirs) else "none", ours[at] if at < len(ours) else "none"
