"""Text that grows piece by piece is the text of all tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_server.backends.byte_text import ByteText
from teacher_server.detokenizer import Detokenizer

TEXT = ByteText()


def cut(ids: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    """Consecutive parts of the given sizes, the rest last."""
    return np.split(ids, np.minimum(np.cumsum(sizes), len(ids)))


@given(text=st.text(min_size=1, max_size=40), sizes=st.lists(st.integers(1, 5), max_size=60))
def test_pieces_joined_are_the_whole_text(text: str, sizes: list[int]) -> None:
    ids = TEXT.encode(text)
    detokenizer = Detokenizer(TEXT.decode)
    parts = [part for part in cut(ids, sizes) if len(part)]
    pieces = [detokenizer.add(part, last=i == len(parts) - 1) for i, part in enumerate(parts)]
    assert "".join(pieces) == TEXT.decode(ids)


@given(ids=st.lists(st.integers(0, 260), min_size=1, max_size=40))
def test_bytes_that_are_no_text_end_as_the_whole_does(ids: list[int]) -> None:
    array = np.array(ids, np.int32)
    detokenizer = Detokenizer(TEXT.decode)
    pieces = [detokenizer.add(array[i : i + 1], last=i == len(ids) - 1) for i in range(len(ids))]
    assert "".join(pieces) == TEXT.decode(array)


def test_a_character_is_held_back_until_it_is_whole() -> None:
    detokenizer = Detokenizer(TEXT.decode)
    ids = TEXT.encode("a€b")
    assert [detokenizer.add(ids[i : i + 1], last=i == 4) for i in range(5)] == ["a", "", "", "€", "b"]


def joining(ids: np.ndarray) -> str:
    """A decoder that drops the space before the first word, as SentencePiece's do."""
    return "".join(f" w{i}" for i in ids.tolist()).removeprefix(" ")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tokenizers_that_join_words_keep_their_spaces(size: int) -> None:
    ids = np.arange(9, dtype=np.int32)
    detokenizer = Detokenizer(joining)
    parts = cut(ids, [size] * (9 // size - 1))
    pieces = [detokenizer.add(part, last=i == len(parts) - 1) for i, part in enumerate(parts)]
    assert "".join(pieces) == joining(ids)
