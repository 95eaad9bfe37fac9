"""Text under rules: the same whatever the pieces, cut where a stop string ends, without a letter of one in a stream."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.scores import FinishReason, Ids, TextRules
from teacher_server.backends.byte_text import ByteText
from teacher_server.grown_text import GrownText

TEXT = ByteText()
NO_PROMPT = np.empty(0, np.int32)
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def read(
    ids: Ids, rules: TextRules, sizes: list[int], reason: FinishReason = LENGTH, prompt: Ids = NO_PROMPT
) -> tuple[list[str], list[str], int, int, str]:
    """Texts and reasonings of the pieces, then how many thoughts and tokens there were, and the stop string."""
    text = GrownText(TEXT.decode, rules, prompt, TEXT.think_ids)
    parts = [part for part in np.split(ids, np.minimum(np.cumsum(sizes), len(ids))) if len(part)]
    texts, reasonings, thoughts, tokens = [], [], 0, 0
    for i, part in enumerate(parts):
        grown = text.add(part, reason if i == len(parts) - 1 else None)
        texts.append(grown.text)
        reasonings.append(grown.reasoning)
        thoughts, tokens = thoughts + grown.reasoning_tokens, tokens + grown.tokens
        if grown.stop:
            return texts, reasonings, thoughts, tokens, grown.stop
    return texts, reasonings, thoughts, tokens, ""


def expected(whole: str, stops: tuple[str, ...], shown: bool) -> tuple[str, str]:
    """The text up to the stop string that is complete first, looked for letter by letter, and that string."""
    for end in range(1, len(whole) + 1):
        for stop in stops:
            if whole[:end].endswith(stop):
                return whole[: end if shown else end - len(stop)], stop
    return whole, ""


LETTERS = st.text("ab€", max_size=30)
STOPS = st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


@given(whole=LETTERS, stops=STOPS, shown=st.booleans(), sizes=st.lists(st.integers(1, 5), max_size=30))
def test_a_stop_string_cuts_the_text_where_it_is_complete(
    whole: str, stops: tuple[str, ...], shown: bool, sizes: list[int]
) -> None:
    text, stop = expected(whole, stops, shown)
    texts, _, _, tokens, found = read(TEXT.encode(whole), TextRules(stops, shown), sizes)
    assert ("".join(texts), found) == (text, stop)
    before = whole[: len(text) + (0 if shown else len(stop))] if stop else whole
    assert tokens == len(TEXT.encode(before))


@given(whole=LETTERS, stops=STOPS, sizes=st.lists(st.integers(1, 3), max_size=30))
def test_no_piece_ever_shows_a_part_of_the_stop_string_that_ends_it(
    whole: str, stops: tuple[str, ...], sizes: list[int]
) -> None:
    text, _ = expected(whole, stops, False)
    texts, *_ = read(TEXT.encode(whole), TextRules(stops), sizes)
    shown = ""
    for piece in texts:
        shown += piece
        assert text.startswith(shown)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    texts, *_ = read(TEXT.encode("a<b<en"), TextRules(("<end>",)), [1] * 6)
    assert texts == ["a", "", "<b", "", "", "<en"]


def test_the_text_of_a_stop_id_is_left_out_unless_it_is_to_be_shown() -> None:
    ids = TEXT.encode("ab.")
    assert "".join(read(ids, TextRules(), [2], STOP)[0]) == "ab"
    assert "".join(read(ids, TextRules(show_stop=True), [2], STOP)[0]) == "ab."
    assert "".join(read(ids, TextRules(("b.",)), [2], STOP)[0]) == "ab"  # the stop id's letters complete nothing


@pytest.mark.parametrize("sizes", [[99], [1] * 99, [3, 4, 5, 6]])
def test_what_stands_between_think_tags_is_reasoning_and_the_tags_are_neither(sizes: list[int]) -> None:
    ids = TEXT.encode("<think>\n1€\n</think>\n\n71")
    texts, reasonings, thoughts, *_ = read(ids, TextRules(reasoning_apart=True), sizes)
    assert ("".join(texts), "".join(reasonings), thoughts) == ("\n\n71", "\n1€\n", 6)
    assert "".join(read(ids, TextRules(), sizes)[0]) == "<think>\n1€\n</think>\n\n71"


def test_tags_are_found_by_id_and_not_by_their_letters() -> None:
    spelled = np.frombuffer(b"<think>a</think>b", np.uint8).astype(np.int32)
    texts, reasonings, thoughts, *_ = read(spelled, TextRules(reasoning_apart=True), [4])
    assert ("".join(texts), "".join(reasonings), thoughts) == ("<think>a</think>b", "", 0)


@pytest.mark.parametrize(
    ("prompt", "reasoning"),
    [("x<think>\n", "a"), ("x<think>\n\n</think>\n\n", ""), ("<think>y</think>z", ""), ("", "")],
)
def test_a_prompt_may_have_opened_the_block(prompt: str, reasoning: str) -> None:
    ids = TEXT.encode("a</think>b")
    texts, reasonings, *_ = read(ids, TextRules(reasoning_apart=True), [1] * 9, prompt=TEXT.encode(prompt))
    assert ("".join(texts), "".join(reasonings)) == (("b" if reasoning else "ab"), reasoning)


def test_a_tag_may_be_a_stop_string_and_a_broken_character_before_it_is_kept() -> None:
    ids = np.concatenate([TEXT.encode("<think>"), TEXT.encode("€")[:2], TEXT.encode("</think>x")])
    _, reasonings, _, tokens, stop = read(ids, TextRules(("</think>",), reasoning_apart=True), [1] * 9)
    assert ("".join(reasonings), tokens, stop) == ("�", 4, "</think>")


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop string is empty"):
        TextRules(("a", ""))
