"""Runs the model up to what the read-out needs, in one of three ways that a self-check at start-up chooses among.

1. `head`: the decoder's final hidden states; the LM head runs on chunks of the scored rows alone.
2. `replay`: the same, but a chunk goes through the whole of the model's `forward` with the decoder's output put in its
   place, for models that cap or scale their logits (Gemma 2, Cohere, Granite).
3. `full`: the logits of every token, for models whose logits are not a function of the last hidden state alone.

Knows the model's call, no queue and no specification. Legend: B rows, N tokens, W width of a feature, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from teacher_server.backends.readout import HeadFn, float_head
from teacher_server.backends.transformers_model import LoadedModel

_LOG = logging.getLogger(__name__)
_LOUD = 100.0


@dataclass(frozen=True, eq=False)
class Features:
    """`run` int64[B, N] -> [B, N, W]; `head` [R, W] -> float32[R, V].

    `equal_lengths` says that a batch may only hold sequences of one length; `full` that W is the padded vocabulary.
    """

    kind: str
    run: Callable[..., Tensor]
    head: HeadFn
    equal_lengths: bool = False


def choose(loaded: LoadedModel, vocab_size: int) -> Features:
    """The first way that agrees with `model(...).logits`, plain and amplified; ValueError for non-finite logits."""
    ids = _probe(vocab_size, 12).to(loaded.device)
    plain = _logits(loaded, ids, vocab_size)
    if not bool(torch.isfinite(plain).all()):
        raise ValueError(f"the model gives non-finite logits in {loaded.dtype_name}; try --dtype bfloat16 or float32")
    for features in _ways(loaded, vocab_size):
        if not _agrees(loaded, features, ids, plain, vocab_size):
            continue
        if features.kind == "replay":
            _LOG.warning("this model changes its logits after the LM head: each chunk of rows passes its whole forward")
        if features.kind == "full":
            _LOG.warning(
                "this model's logits are not its LM head over the last hidden state: all [tokens, vocabulary] logits "
                "of a batch are computed, which costs memory and, for long prompts before score_start, time"
            )
        exact = loaded.packs or _padding_is_exact(loaded, features, vocab_size)
        if not exact:
            _LOG.warning("this model's scores depend on right padding: only sequences of equal length share a batch")
        return Features(features.kind, features.run, features.head, equal_lengths=not exact)
    raise ValueError("the model's own logits are not reproducible in two calls; its forward seems to be random")


def _ways(loaded: LoadedModel, vocab_size: int) -> list[Features]:
    model = loaded.model
    ways = []
    head = model.get_output_embeddings()
    if loaded.decoder is not model and head is not None:
        hidden = _hidden(loaded)
        ways.append(Features("head", hidden, float_head(head, vocab_size)))
        ways.append(Features("replay", hidden, _replay(loaded, vocab_size)))
    ways.append(full(loaded, vocab_size))
    return ways


def full(loaded: LoadedModel, vocab_size: int) -> Features:
    """The third way, which every model knows."""

    def run(input_ids: Tensor, *, use_cache: bool = False, **extra: Any) -> Tensor:
        logits: Tensor = loaded.model(input_ids=input_ids, use_cache=use_cache, **extra).logits
        return logits

    return Features("full", run, lambda rows: rows[:, :vocab_size].float())


def _hidden(loaded: LoadedModel) -> Callable[..., Tensor]:
    def run(input_ids: Tensor, *, use_cache: bool = False, **extra: Any) -> Tensor:
        hidden: Tensor = loaded.decoder(input_ids=input_ids, use_cache=use_cache, **extra)[0]
        return hidden

    return run


def _replay(loaded: LoadedModel, vocab_size: int) -> HeadFn:
    decoder: Any = loaded.decoder

    def head(rows: Tensor) -> Tensor:
        before = decoder.__dict__.get("forward")
        decoder.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=rows[None])
        try:
            ids = torch.zeros(1, rows.shape[0], dtype=torch.long, device=loaded.device)
            logits: Tensor = loaded.model(input_ids=ids, use_cache=False).logits[0, :, :vocab_size]
        finally:
            del decoder.forward
            if before is not None:
                decoder.forward = before
        return logits.float()

    return head


def _agrees(loaded: LoadedModel, features: Features, ids: Tensor, plain: Tensor, vocab_size: int) -> bool:
    try:
        rows = features.run(ids)[0]
        if not _close(features.head(rows), plain, loaded.dtype):
            return False
        if features.kind == "full":
            return True
        # Caps are invisible where logits are small, so both sides are compared with loud hidden states too.
        factor = _LOUD / max(float(plain.abs().max()), 1e-6)
        return _close(features.head(rows * factor), _logits(loaded, ids, vocab_size, factor), loaded.dtype)
    except (TypeError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        _LOG.info("the read-out %r does not fit this model: %s", features.kind, error)
        return False


def _padding_is_exact(loaded: LoadedModel, features: Features, vocab_size: int) -> bool:
    ids = _probe(vocab_size, 16).to(loaded.device)
    padded = ids.repeat(2, 1)
    padded[0, 7:] = 0
    alone, together = features.head(features.run(ids[:, :7])[0]), features.head(features.run(padded)[0, :7])
    return _close(alone, together, loaded.dtype)


def _probe(vocab_size: int, length: int) -> Tensor:
    return ((torch.arange(length) * 7919 + 13) % vocab_size)[None]


def _logits(loaded: LoadedModel, ids: Tensor, vocab_size: int, factor: float = 1.0) -> Tensor:
    def amplify(_module: Any, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] * factor, *output[1:])
        output.last_hidden_state = output.last_hidden_state * factor
        return output

    hook = loaded.decoder.register_forward_hook(amplify) if factor != 1 else None
    try:
        logits: Tensor = loaded.model(input_ids=ids, use_cache=False).logits[0, :, :vocab_size].float()
    finally:
        if hook is not None:
            hook.remove()
    return logits


def _close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    bound = max(1e-4, 4 * torch.finfo(dtype).eps) * max(float(theirs.abs().max()), 1e-3)
    return ours.shape == theirs.shape and float((ours - theirs.to(ours.device)).abs().max()) <= bound
