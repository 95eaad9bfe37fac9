"""Text of a completion that grows: each new piece of tokens gives the characters that are certain by now.

It knows a decoder of ids and no model. A piece that ends inside a character is held back until the next one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from protos.scores import Ids

REPLACEMENT = "�"


class Detokenizer:
    """Decodes one completion incrementally; the pieces joined are the text of all its tokens.

    Only a short window is decoded again for each piece: the tokens of the last piece that gave text, as context for
    tokenizers that join words, and what came since.
    """

    def __init__(self, decode: Callable[[Ids], str]) -> None:
        self._decode = decode
        self._ids: list[Ids] = []
        self._window = np.empty(0, np.int32)
        self._known = 0
        """Number of tokens of the window whose text was given."""
        self._text = ""

    def add(self, ids: Ids, *, last: bool) -> str:
        """The new text after int32[R] more tokens; `last` gives out what was held back."""
        self._ids.append(ids)
        if last:
            whole = self._decode(np.concatenate(self._ids))
            new = whole[len(self._text) :] if whole.startswith(self._text) else self._piece(ids, force=True)
        else:
            new = self._piece(ids, force=False)
        self._text += new
        return new

    def _piece(self, ids: Ids, *, force: bool) -> str:
        self._window = np.concatenate([self._window, ids])
        known = self._decode(self._window[: self._known])
        text = self._decode(self._window)
        if (text.endswith(REPLACEMENT) and not force) or len(text) <= len(known):
            return ""
        self._window = self._window[self._known :]
        self._known = len(self._window)
        return text[len(known) :]
