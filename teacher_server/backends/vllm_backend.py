"""vLLM as a teacher: one engine in processes of its own scores and generates.

It loads, describes and checks itself here; `vllm_engine` talks to vLLM, `vllm_worker` sits inside it. Legend: P prompt
tokens, N tokens of a sequence, V real vocabulary.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from collections.abc import Set as AbstractSet
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np

from protos.errors import TeacherError, TeacherFailed, Unavailable, Unsupported
from protos.head import Head, held_as, itemsize
from protos.scores import Field, Ids, Limits, Mode, Sampling, Scores, ScoreSpec, Sequence, TeacherInfo
from teacher_server.backends import model_files, vllm_check, vllm_options
from teacher_server.backends.base import Piece, Room, limits
from teacher_server.backends.checkpoint_face import CheckpointFace, longest_sequence
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.steps import Observer, nobody
from teacher_server.backends.text import HuggingFaceText
from teacher_server.backends.vllm_engine import MAX_TEMPERATURE, MIN_TEMPERATURE, Engine, set_environment
from teacher_server.backends.vllm_generation import Wish, completion

_LOG = logging.getLogger(__name__)
MEASURE_S = 10.0
"""Seconds between two questions to the workers of how long they have read out."""
_HEAD_BYTES = 1 << 26
"""Bytes of the head that the workers are asked for at a time."""


class VllmBackend(CheckpointFace):
    """A `base.Backend`; see there for what each method promises."""

    def __init__(self, options: BackendOptions) -> None:
        set_environment()
        import vllm

        super().__init__(options)
        self._version = str(vllm.__version__)
        self._engine: Engine | None = None
        self._reader: vllm_check.Reader | None = None
        self._observer: Observer = nobody
        self._measuring: asyncio.Task[None] | None = None

    def observe(self, observer: Observer) -> None:
        """Tells `observer` of each step whose outputs arrive; to be called before `start`."""
        self._observer = observer

    @property
    def batch_tokens(self) -> int:
        """Tokens of one engine step."""
        if self._engine is None:
            return self._options.batch_tokens
        return int(self._engine.config.scheduler_config.max_num_batched_tokens)

    @property
    def generation_room(self) -> Room:
        """The engine's blocks of keys and values, and the sequences of one step, over all its replicas."""
        if self._engine is None:
            return Room(0, 0)
        config = self._engine.config
        cache, replicas = config.cache_config, int(config.parallel_config.data_parallel_size)
        each = getattr(cache, "kv_cache_size_tokens", None)  # knows about models with several kinds of attention
        tokens = each * replicas if each else int(cache.num_gpu_blocks or 0) * int(cache.block_size)
        return Room(max(tokens, self.batch_tokens), int(config.scheduler_config.max_num_seqs) * replicas)

    @property
    def steps(self) -> int:
        """Outputs of steps that the engine's processes have sent."""
        return self._engine.steps if self._engine is not None else 0

    async def start(self) -> None:
        """Starts the engine, puts the scorer into its workers and checks what it says."""
        vllm_options.check_version(self._version)
        folder = await asyncio.to_thread(model_files.resolve, self._options.model)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        text = await asyncio.to_thread(self.make_text, folder)
        known = config.get("max_position_embeddings")
        # The engine always samples a token, so it wants one position more.
        longest = longest_sequence(self._options, int(known) - 1 if known else None)
        args = vllm_options.engine_args(self._options, folder, longest)
        hashing = asyncio.create_task(asyncio.to_thread(_fingerprint, folder, args, text, self._version))
        engine = None
        try:
            engine = await asyncio.to_thread(Engine.start, args)
            vocab_size = min(text.vocab_size, int(engine.config.model_config.get_vocab_size()))
            found = await self._prepare(engine, vocab_size)
            temperatures = self._options.max_temperatures
            reader = await vllm_check.choose(engine, found, vocab_size, engine.dtype, temperatures)
            accepted = limits(self._options, vocab_size, longest)
            info = self._describe(engine, reader, found, text, vocab_size, accepted, await hashing)
        except BaseException:
            hashing.cancel()
            if engine is not None:
                await engine.close()
            raise
        self.present(info, text)
        self._engine, self._reader = engine, reader
        engine.meter.observer = self._observer
        if found.get("measures"):
            self._measuring = asyncio.create_task(self._measure(engine))
        _LOG.info("vLLM %s: %s", self._version, found)

    def _describe(
        self,
        engine: Engine,
        reader: vllm_check.Reader,
        found: dict[str, Any],
        text: HuggingFaceText,
        vocab_size: int,
        limits: Limits,
        hashes: list[str],
    ) -> TeacherInfo:
        model = engine.config.model_config
        states = Field.HIDDEN_STATES in reader.fields
        return TeacherInfo(
            name=self._options.served_name,
            fingerprint=model_files.digest([*hashes, engine.dtype, type(reader).__name__]),
            tokenizer_hash=text.tokenizer_hash,
            template_hash=text.template_hash,
            vocab_size=vocab_size,
            normalized_size=vocab_size if found.get("masks") else int(model.get_vocab_size()),
            eos_token_ids=text.eos_token_ids,
            limits=limits,
            modes=text.modes,
            fields=reader.fields,
            can_generate=True,
            engine=f"vllm {self._version}",
            dtype=engine.dtype,
            quantization=str(model.quantization or "none"),
            hidden_size=int(found["hidden_size"]) if states else 0,
            hidden_dtype=str(found["hidden_dtype"]) if states else "",
        )

    async def _prepare(self, engine: Engine, vocab_size: int) -> dict[str, Any]:
        """What the workers' last stage found of itself; empty where the extension does not fit this vLLM."""
        try:
            answers = await engine.call("teacher_prepare", vocab_size)
        except TeacherFailed as error:
            _LOG.warning("the extension does not fit vLLM %s: %s", self._version, error.__cause__ or error)
            return {}
        found: dict[str, Any] = next((a for a in answers if a["runner"] != "none"), answers[0])
        return found

    async def score(self, sequence: Sequence, spec: ScoreSpec) -> Scores:
        """The scores of one sequence; the engine batches what is submitted at the same time."""
        return await self._ready()[1].score(sequence, spec)

    async def head(self, rows: int) -> AsyncIterator[Head]:
        """The LM head in parts of `rows` rows; the workers that hold a shard of it each send theirs."""
        engine, _ = self._ready()
        info = self.info
        if Field.HIDDEN_STATES not in info.fields:
            raise Unsupported("this teacher's logits are not a plain product with an LM head; score top_k instead")
        step = max(1, _HEAD_BYTES // (info.hidden_size * itemsize(info.hidden_dtype)) // rows) * rows
        for first in range(0, info.vocab_size, step):
            last = min(info.vocab_size, first + step)
            held = [part for part in await engine.call("teacher_head_rows", first, last) if part is not None]
            held.sort(key=lambda part: int(part[0]))
            raw, bias = b"".join(part[1] for part in held), b"".join(part[2] for part in held)
            weight = np.frombuffer(raw, held_as(info.hidden_dtype)).reshape(-1, info.hidden_size)
            if len(weight) != last - first:
                raise TeacherFailed from RuntimeError(
                    f"the workers hold {len(weight)} of {last - first} rows of the head"
                )
            biases = np.frombuffer(bias, np.float32) if bias else None
            for part in Head(weight, info.hidden_dtype, biases, first, info.vocab_size - last).parts(rows):
                yield part

    async def generate(
        self,
        prompt_ids: Ids,
        sampling: Sampling,
        *,
        n: int,
        logprobs: bool,
        stream: bool,
        mode: Mode | None,
        alternatives: int = 0,
        dropped: AbstractSet[int] = frozenset(),
    ) -> AsyncIterator[list[Piece]]:
        """Pieces of the n completions of int32[P], which share its prefill through the engine's prefix cache."""
        engine, _ = self._ready()
        if sampling.temperature > MAX_TEMPERATURE or 0 < sampling.temperature < MIN_TEMPERATURE:
            raise Unsupported(
                f"vLLM samples at temperature 0 or from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}, "
                f"got {sampling.temperature:g}"
            )
        tags = self.tags_for(sampling)
        longest = self.info.limits.sequence_tokens
        wish = Wish(prompt_ids, sampling, logprobs, stream, self.info.eos_token_ids, longest, tags, alternatives)
        queue: asyncio.Queue[Piece | asyncio.Task[None]] = asyncio.Queue()

        async def run(sample_index: int) -> None:
            async with aclosing(completion(wish, sample_index, engine, self._forced)) as parts:
                async for piece in parts:
                    if sample_index in dropped:
                        return
                    queue.put_nowait(piece)

        tasks = [asyncio.create_task(run(index)) for index in range(n)]
        for task in tasks:
            task.add_done_callback(queue.put_nowait)
        try:
            running = n
            while running or not queue.empty():
                pieces: list[Piece] = []
                items = [await queue.get(), *(queue.get_nowait() for _ in range(queue.qsize()))]
                for item in items:
                    if isinstance(item, Piece):
                        pieces.append(item)
                    else:
                        running -= 1
                        item.result()
                if pieces:
                    yield pieces
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _forced(self, token_ids: Ids, start: int, alternatives: int) -> Scores:
        """Log-probabilities of the tokens from `start` on, and alternatives to them."""
        want = {Field.TOKEN_LOGPROBS} | ({Field.TOP} if alternatives else set())
        return await self.score(Sequence(token_ids, start), ScoreSpec(alternatives, want=frozenset(want)))

    async def _measure(self, engine: Engine) -> None:
        """Asks the workers now and then how long they have read out; those of one sequence do so at the same time."""
        while True:
            await asyncio.sleep(MEASURE_S)
            if not engine.meter.scored:
                continue
            engine.meter.scored = False
            try:
                answers = await engine.call("teacher_readout_s")
            except TeacherError as error:
                _LOG.debug("the workers do not say how long they have read out: %s", error)
                return
            engine.meter.readout_s += max(answers)

    async def healthy(self) -> bool:
        """Whether the engine's processes run."""
        return self._engine is not None and self._engine.alive

    async def close(self) -> None:
        """Ends the engine's processes."""
        engine, self._engine = self._engine, None
        if self._measuring is not None:
            self._measuring.cancel()
        if engine is not None:
            await engine.close()

    def _ready(self) -> tuple[Engine, vllm_check.Reader]:
        if self._engine is None or self._reader is None:
            raise Unavailable("the teacher is not running; try again in a while", retry_after_s=5.0)
        return self._engine, self._reader


def _fingerprint(folder: Path, args: Any, text: HuggingFaceText, version: str) -> list[str]:
    """What the scores depend on: files, tokenizer, template, and the arguments that change the arithmetic."""
    files = model_files.hashes(folder, weights=args.load_format != "dummy")
    changing = ("quantization", "kv_cache_dtype", "hf_overrides", "load_format", "seed", "enable_lora")
    chosen = [f"{name}={getattr(args, name, None)}" for name in changing]
    return [*files, *chosen, text.tokenizer_hash, text.template_hash, version]
