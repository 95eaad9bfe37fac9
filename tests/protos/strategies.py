"""Hypothesis strategies for the contract's domain types, and equality of what holds arrays."""

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protos import scores as domain
from protos.head import Head

ids = st.integers(0, 2**31 - 1)
finite = st.floats(-1e4, 0, width=32)


def id_arrays(shape: int | tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    """int32 arrays of token ids."""
    return hnp.arrays(np.int32, shape, elements=ids)


def float_arrays(shape: int | tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    """float32 arrays of log-probabilities."""
    return hnp.arrays(np.float32, shape, elements=finite)


def bit_arrays(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    """Hidden states: uint16 bits or float32."""
    return hnp.arrays(np.uint16, shape) | float_arrays(shape)


@st.composite
def heads(draw: st.DrawFn) -> Head:
    """LM heads of every dtype, with and without a bias."""
    dtype = draw(st.sampled_from(sorted(domain.BITS)))
    rows, width = draw(st.integers(1, 20)), draw(st.integers(1, 5))
    weight = hnp.arrays(np.uint16, (rows, width)) if domain.BITS[dtype] is np.uint16 else float_arrays((rows, width))
    return Head(draw(weight), dtype, draw(st.none() | float_arrays(rows)))


@st.composite
def sequences(draw: st.DrawFn, max_tokens: int = 40) -> domain.Sequence:
    """Sequences with and without candidates."""
    n = draw(st.integers(2, max_tokens))
    start = draw(st.integers(1, n - 1))
    width = draw(st.integers(0, 4))
    candidates = draw(id_arrays((n - start, width))) if width else None
    return domain.Sequence(draw(id_arrays(n)), start, candidates)


@st.composite
def specs(draw: st.DrawFn) -> domain.ScoreSpec:
    """Specifications."""
    top_k = draw(st.integers(0, 128))
    fields = set(domain.Field) if top_k else set(domain.Field) - {domain.Field.TOP, domain.Field.TAIL_LOGPROB}
    temperatures = draw(st.lists(st.floats(0.0625, 8, width=32), max_size=4))
    return domain.ScoreSpec(top_k, tuple(temperatures), draw(st.frozensets(st.sampled_from(sorted(fields, key=str)))))


@st.composite
def scores(draw: st.DrawFn) -> domain.Scores:
    """Scores with any subset of fields, at least one."""
    t, k, c, m = (draw(st.integers(1, most)) for most in (30, 5, 3, 3))
    arrays = {
        "token_logprobs": draw(float_arrays(t)),
        "top_token_ids": draw(id_arrays((t, k))),
        "top_logprobs": draw(float_arrays((t, k))),
        "candidate_logprobs": draw(float_arrays((t, c))),
        "log_normalizer": draw(float_arrays((t, m))),
        "tail_logprob": draw(float_arrays((t, m))),
        "hidden_states": draw(bit_arrays((t, k))),
    }
    groups = [
        ["token_logprobs"],
        ["top_token_ids", "top_logprobs"],
        ["candidate_logprobs"],
        ["log_normalizer"],
        ["tail_logprob"],
        ["hidden_states"],
    ]
    kept = draw(st.lists(st.sampled_from(range(6)), min_size=1, unique=True))
    return domain.Scores(**{name: arrays[name] for group in kept for name in groups[group]})


text = st.text(st.characters(codec="utf-8"), max_size=20)


@st.composite
def prompts(draw: st.DrawFn) -> domain.Prompt:
    """Prompts of each kind and mode."""
    mode = draw(st.sampled_from([None, *domain.Mode]))
    kind = draw(st.sampled_from(["messages", "ids", "text"]))
    if kind == "ids":
        return domain.Prompt(token_ids=draw(id_arrays(draw(st.integers(1, 20)))), mode=mode)
    if kind == "text":
        return domain.Prompt(text=draw(text.filter(bool)), mode=mode)
    turns = draw(
        st.lists(st.builds(domain.Message, st.sampled_from(["system", "user", "assistant"]), text), min_size=1)
    )
    return domain.Prompt(tuple(turns), mode=mode)


samplings = st.builds(
    domain.Sampling,
    max_tokens=st.integers(1, 10_000),
    temperature=st.floats(0, 4, width=32),
    top_p=st.floats(0.0625, 1, width=32),
    top_k=st.integers(0, 100),
    stop_token_ids=st.lists(ids, max_size=3).map(tuple),
    seed=st.none() | st.integers(0, 2**64 - 1),
    ignore_eos=st.booleans(),
    max_thinking_tokens=st.integers(0, 1000),
)

teachers = st.builds(
    domain.TeacherInfo,
    name=text,
    fingerprint=text,
    tokenizer_hash=text,
    template_hash=text,
    vocab_size=st.integers(0, 2**32 - 1),
    normalized_size=st.integers(0, 2**32 - 1),
    eos_token_ids=st.lists(ids, max_size=4).map(tuple),
    limits=st.builds(domain.Limits, *[st.integers(0, 2**32 - 1)] * 6),
    modes=st.lists(st.sampled_from(domain.Mode), unique=True).map(tuple),
    fields=st.frozensets(st.sampled_from(sorted(domain.Field, key=str))),
    can_generate=st.booleans(),
    engine=text,
    dtype=text,
    quantization=text,
    hidden_size=st.integers(0, 2**32 - 1),
    hidden_dtype=text,
)


@st.composite
def deltas(draw: st.DrawFn) -> domain.CompletionDelta:
    """Pieces of completions."""
    r = draw(st.integers(1, 10))
    return domain.CompletionDelta(
        draw(st.integers(0, 1000)),
        draw(st.integers(0, 1000)),
        draw(id_arrays(r)),
        draw(st.none() | float_arrays(r)),
        draw(text),
        draw(st.sampled_from([None, *domain.FinishReason])),
        draw(st.none() | id_arrays(draw(st.integers(1, 10)))),
    )


def same(a: Any, b: Any) -> bool:
    """Equality of domain objects that hold arrays: values, dtypes and shapes."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
