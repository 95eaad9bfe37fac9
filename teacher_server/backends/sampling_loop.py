"""Generates for many requests at once: rows join a running batch, leave it when they end, and never wait for others.

One call of `advance` does one bounded piece of work, a prefill or a step, so that its caller can do other things in
between. Knows the model's call and its cache, no thread. Legend: B running rows, L positions in the cache.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protos.errors import TeacherFailed
from teacher_server.backends import kv_cache
from teacher_server.backends.features import Features
from teacher_server.backends.jobs import GenerateJob, Outbox
from teacher_server.backends.packing import pack
from teacher_server.backends.rows import Row
from teacher_server.backends.sampling import Draw, alternatives, sample

_LOG = logging.getLogger(__name__)
_PATIENCE = 16
"""Steps after which a few waiting rows join although the running batch is much larger."""


class SamplingLoop:
    """The running batch and the rows that wait for it.

    `prefill_tokens` bounds one prefill, `cache_tokens` rows times their longest possible length, `eos` are the
    model's ids and `max_tokens` the longest prompt with its completion.
    """

    def __init__(
        self,
        features: Features,
        decoder: Any,
        config: Any,
        device: torch.device,
        *,
        eos: tuple[int, ...],
        max_tokens: int,
        prefill_tokens: int,
        cache_tokens: int,
        most_rows: int = 1024,
    ) -> None:
        self._features, self._config, self._device = features, config, device
        self._eos, self._max_tokens = frozenset(eos), max_tokens
        self._prefill_tokens, self._cache_tokens, self._most_rows = prefill_tokens, cache_tokens, most_rows
        takes = inspect.signature(decoder.forward).parameters
        self._takes_positions = "position_ids" in takes
        self._cache_name = "cache" if "cache" in takes else "past_key_values"  # renamed in transformers 5.24
        self._joinable = kv_cache.joinable(kv_cache.new_cache(config)) and not features.equal_lengths
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []
        self._cache: Any = None
        self._length = 0
        self._pads: list[int] = []
        self._tokens = torch.empty(0, dtype=torch.long, device=device)
        self._parameters: Draw | None = None
        self._pads_B: Tensor | None = None
        self._since_join = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self._rows)

    def add(self, job: GenerateJob) -> None:
        """Takes a job in; its rows wait for room."""
        self._waiting.extend(Row(job, index, self._eos, self._max_tokens) for index in range(job.n))

    def jobs(self) -> list[GenerateJob]:
        """Every job that has not ended."""
        return list({id(row.job): row.job for row in (*self._rows, *self._waiting)}.values())

    @torch.inference_mode()
    def advance(self, outbox: Outbox) -> tuple[int, int]:
        """One prefill or one step; completed pieces go to `outbox`. Out of memory: fewer rows run from then on.

        How many rows, and tokens of these, it was about.
        """
        self._drop_unwanted(outbox)
        admitted = self._admit()
        size = (len(admitted), sum(row.length for row in admitted)) if admitted else (len(self._rows),) * 2
        try:
            if admitted:
                self._prefill(admitted, outbox)
            elif self._rows:
                self._step(outbox)
        except torch.OutOfMemoryError:
            self._shrink(admitted, outbox)
        outbox.flush()
        return size

    def _drop_unwanted(self, outbox: Outbox) -> None:
        gone = [row for row in (*self._waiting, *self._rows) if row.unwanted and not row.ended]
        for row in gone:
            row.ended = True
            outbox.dropped(row.job)
        if gone:
            self._waiting = deque(row for row in self._waiting if not row.ended)
        ended = sum(row.ended for row in self._rows)
        if ended and (ended == len(self._rows) or (self._joinable and ended * 8 >= len(self._rows))):
            self._keep([i for i, row in enumerate(self._rows) if not row.ended])

    def _admit(self) -> list[Row]:
        """Rows to prefill now, off the queue: as many as there is room for, when they are worth a join."""
        if not self._waiting or (self._rows and not self._joinable):
            return []
        self._since_join += 1
        if self._rows and len(self._waiting) * 8 < len(self._rows) and self._since_join < _PATIENCE:
            return []
        longest = max((row.longest for row in self._rows), default=0)
        room, tokens = self._most_rows - len(self._rows), 0
        chosen: list[Row] = []
        while self._waiting and len(chosen) < room:
            row = self._waiting[0]
            longest, tokens = max(longest, row.longest), tokens + row.length
            if (len(self._rows) + len(chosen) + 1) * longest > self._cache_tokens and (chosen or self._rows):
                break
            if chosen and tokens > self._prefill_tokens:
                break
            chosen.append(self._waiting.popleft())
        if not chosen:
            return []
        self._since_join = 0
        # One pack at a time: the rest goes back to the head of the queue and is prefilled by the next call.
        batch = pack([row.length for row in chosen], self._prefill_tokens, equal=not self._joinable)[0]
        taken = [chosen[i] for i in sorted(batch)]
        self._waiting.extendleft(reversed([row for i, row in enumerate(chosen) if i not in set(batch)]))
        return taken

    def _prefill(self, rows: list[Row], outbox: Outbox) -> None:
        """Runs the prompts of new rows, each distinct one once, draws their first tokens, and joins the batch."""
        prompts, source = _distinct(rows) if self._joinable else (rows, list(range(len(rows))))
        length = max(row.length for row in prompts)
        ids = np.zeros((len(prompts), length), dtype=np.int64)
        pads = [length - row.length for row in prompts]
        for i, row in enumerate(prompts):
            ids[i, pads[i] :] = row.context()
        cache = kv_cache.new_cache(self._config)
        pads_B = torch.tensor(pads, device=self._device)
        last = self._run(torch.from_numpy(ids).to(self._device), cache, pads_B, 0)
        index = torch.tensor(source, device=self._device)
        if len(rows) > len(prompts):
            kv_cache.select(cache, index)
        tokens = self._draw(rows, self._features.head(last).to(self._device)[index], outbox)
        if self._rows:
            self._keep([i for i, row in enumerate(self._rows) if not row.ended])
        if self._rows:
            joined = kv_cache.join(self._cache, cache)
            self._pads = [p + joined - self._length for p in self._pads]
            pads = [p + joined - length for p in pads]
            self._length, self._tokens = joined, torch.cat([self._tokens, tokens])
        else:
            self._cache, self._length, self._tokens, self._pads = cache, length, tokens, []
        self._rows = [*self._rows, *rows]
        self._pads = [*self._pads, *(pads[i] for i in source)]
        self._parameters = self._pads_B = None

    def _step(self, outbox: Outbox) -> None:
        """Runs the newest token of every row and draws the next."""
        if self._pads_B is None:
            self._pads_B = torch.tensor(self._pads, device=self._device)
        last = self._run(self._tokens[:, None], self._cache, self._pads_B, self._length)
        self._length += 1
        self._tokens = self._draw(self._rows, self._features.head(last), outbox, batch=True)

    def _run(self, ids: Tensor, cache: Any, pads_B: Tensor, before: int) -> Tensor:
        """Features [B, W] of the last of int64[B, new] ids that follow `before` positions, padding included."""
        after = before + ids.shape[1]
        at = torch.arange(after, device=self._device)
        extra: dict[str, Any] = {"attention_mask": (at >= pads_B[:, None]).long(), self._cache_name: cache}
        if self._takes_positions:
            extra["position_ids"] = (at[before:] - pads_B[:, None]).clamp(min=0)
        return self._features.run(ids, use_cache=True, **extra)[:, -1]

    def _draw(self, rows: list[Row], logits: Tensor, outbox: Outbox, *, batch: bool = False) -> Tensor:
        """Draws a token for each row, records it, and queues what its caller should see; int64[B]."""
        logits = logits.to(self._device)
        fixed = self._parameters if batch else None
        if fixed is None:
            fixed = _parameters(rows, self._device)
            if batch:
                self._parameters = fixed
        uniform = torch.tensor([row.uniform() for row in rows], dtype=torch.float64, device=self._device)
        forced = fixed.forced
        if any(row.budget is not None for row in rows):
            forced = torch.tensor([row.forced() for row in rows], device=self._device)
        ids, logprobs = sample(logits, Draw(uniform, fixed.temperature, fixed.top_p, fixed.top_k, forced))
        top = alternatives(logits, [0 if row.ended else row.job.alternatives for row in rows])
        pieces: dict[int, tuple[GenerateJob, list[Any]]] = {}
        for at, (row, token, logprob) in enumerate(zip(rows, ids.tolist(), logprobs.tolist(), strict=True)):
            if row.ended:
                continue
            if not np.isfinite(logprob):
                _LOG.error("generation gave a non-finite log-probability after %d tokens", row.length)
                row.job.cancelled = row.ended = True
                outbox.fail(row.job, TeacherFailed())
                continue
            piece = row.record(token, logprob, top.get(at))
            if piece is not None:
                pieces.setdefault(id(row.job), (row.job, []))[1].append(piece)
        for job, new in pieces.values():
            outbox.pieces(job, new)
        return ids

    def _keep(self, alive: list[int]) -> None:
        """Compacts the running batch to those rows and drops positions that are padding in all of them."""
        if len(alive) == len(self._rows):
            return
        self._rows = [self._rows[i] for i in alive]
        self._parameters = self._pads_B = None
        if not alive:
            self._cache, self._pads, self._length = None, [], 0
            return
        skip = min(self._pads[i] for i in alive)
        index = torch.tensor(alive, device=self._device)
        kv_cache.select(self._cache, index, skip)
        self._pads = [self._pads[i] - skip for i in alive]
        self._length -= skip
        self._tokens = self._tokens[index]

    def _shrink(self, admitted: list[Row], outbox: Outbox) -> None:
        """After running out of memory: all rows start again from the tokens that they have, half as many at once."""
        rows = [row for row in (*self._rows, *admitted) if not row.ended]
        self._rows, self._cache, self._pads, self._length = [], None, [], 0
        self._parameters = self._pads_B = None
        torch.cuda.empty_cache()
        if len(rows) <= 1:
            for row in rows:
                _LOG.error("out of memory with a single row of %d tokens", row.length)
                row.job.cancelled = True
                outbox.fail(row.job, TeacherFailed())
            return
        self._most_rows = max(1, len(rows) // 2)
        _LOG.warning("out of memory with %d rows; at most %d run at once from now on", len(rows), self._most_rows)
        self._waiting.extendleft(reversed(rows))


def _distinct(rows: list[Row]) -> tuple[list[Row], list[int]]:
    """Rows with contexts of their own, and for each row the index of its context among them."""
    first: dict[tuple[int, int], int] = {}
    distinct: list[Row] = []
    source = []
    for row in rows:
        key = (id(row.job), -1 if row.fresh else row.sample_index)
        if key not in first:
            first[key] = len(distinct)
            distinct.append(row)
        source.append(first[key])
    return distinct, source


def _parameters(rows: list[Row], device: torch.device) -> Draw:
    samplings = [row.job.sampling for row in rows]
    return Draw(
        uniform=torch.zeros(0),
        temperature=torch.tensor([s.temperature for s in samplings], device=device),
        top_p=torch.tensor([s.top_p for s in samplings], device=device),
        top_k=torch.tensor([s.top_k for s in samplings], device=device),
        forced=torch.full((len(rows),), -1, device=device),
    )
