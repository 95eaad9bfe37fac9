"""Any causal language model of transformers as a teacher: scores and generates from one thread of this process.

The asyncio side of it: start, submit, await, cancel, close. Knows no tensor; `worker.py` owns the model.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from collections.abc import Set as AbstractSet

import torch

from protos.errors import TeacherError, Unavailable, Unsupported
from protos.head import Head
from protos.scores import Field, Ids, Mode, Sampling, Scores, ScoreSpec, Sequence, TeacherInfo
from teacher_server.backends import features as features_module
from teacher_server.backends import model_files, readout_check, transformers_model
from teacher_server.backends.base import Piece, Room, limits
from teacher_server.backends.checkpoint_face import CheckpointFace, longest_sequence
from teacher_server.backends.jobs import GenerateJob, ScoreJob
from teacher_server.backends.lm_head import LmHead, offered
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.sampling_loop import SamplingLoop
from teacher_server.backends.scorer import Scorer
from teacher_server.backends.steps import Observer, nobody, note
from teacher_server.backends.text import HuggingFaceText
from teacher_server.backends.transformers_model import LoadedModel
from teacher_server.backends.worker import Engine, Worker

_LOG = logging.getLogger(__name__)
_MOST_ROWS = 1024
"""Completions that grow at the same time."""


class TransformersBackend(CheckpointFace):
    """A `base.Backend`; see there for what each method promises."""

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(options)
        self._worker: Worker | None = None
        self._head: LmHead | None = None
        self._room = Room(0, 0)
        self._observer: Observer = nobody

    def observe(self, observer: Observer) -> None:
        """Tells `observer` of each batch of scores and step of generation; to be called before `start`."""
        self._observer = observer

    @property
    def batch_tokens(self) -> int:
        """Tokens of one scoring batch, padding included."""
        return self._options.batch_tokens

    @property
    def generation_room(self) -> Room:
        """Positions of the cache of keys and values, and rows of the running batch."""
        return self._room

    @property
    def steps(self) -> int:
        """Batches of scores and steps of generation that have ended."""
        return self._worker.steps if self._worker is not None else 0

    async def start(self) -> None:
        """Loads and checks the model in its thread, so that the loop can answer meanwhile."""
        self._worker = Worker(self._make, batch_tokens=self._options.batch_tokens, observer=self._observer)
        await asyncio.wrap_future(self._worker.ready)

    def _make(self) -> Engine:
        options = self._options
        folder = model_files.resolve(options.model)
        model_files.weight_files(folder)
        text = self.make_text(folder)
        loaded = transformers_model.load(folder, options)
        width = int(loaded.model.get_input_embeddings().weight.shape[0])
        vocab_size = min(text.vocab_size, width)
        if text.vocab_size > width:
            _LOG.warning("the tokenizer knows %d ids, the model %d; the rest are refused", text.vocab_size, width)
        with torch.inference_mode():
            features = features_module.choose(loaded, vocab_size)
        self._head = offered(loaded, features, vocab_size)
        kernels = readout_check.choose(loaded.device, vocab_size)
        self.present(self._describe(text, loaded, vocab_size, self._fingerprint(text, loaded)), text)
        limits = self.info.limits
        self._room = Room(_cache_tokens(loaded, options.batch_tokens), _MOST_ROWS)
        generation = SamplingLoop(
            features,
            loaded.decoder,
            loaded.config,
            loaded.device,
            eos=text.eos_token_ids,
            max_tokens=limits.sequence_tokens,
            prefill_tokens=options.batch_tokens,
            cache_tokens=self._room.tokens,
            most_rows=self._room.completions,
        )
        return Engine(
            scorer=Scorer(features, loaded.device, vocab_size, kernels, packs=loaded.packs),
            generation=generation,
            padded=not loaded.packs,
            equal=features.equal_lengths,
            boundary=loaded.length_boundary,
        )

    def _fingerprint(self, text: HuggingFaceText, loaded: LoadedModel) -> str:
        parts = (text.tokenizer_hash, text.template_hash, loaded.dtype_name, loaded.quantization)
        return model_files.fingerprint(
            model_files.resolve(self._options.model), (*parts, transformers_model.engine_name())
        )

    def _describe(self, text: HuggingFaceText, loaded: LoadedModel, vocab_size: int, fingerprint: str) -> TeacherInfo:
        options = self._options
        return TeacherInfo(
            name=options.served_name,
            fingerprint=fingerprint,
            tokenizer_hash=text.tokenizer_hash,
            template_hash=text.template_hash,
            vocab_size=vocab_size,
            normalized_size=vocab_size,
            eos_token_ids=text.eos_token_ids,
            limits=limits(options, vocab_size, longest_sequence(options, loaded.max_tokens)),
            modes=text.modes,
            fields=frozenset(Field) - (set() if self._head else {Field.HIDDEN_STATES}),
            can_generate=True,
            engine=transformers_model.engine_name(),
            dtype=loaded.dtype_name,
            quantization=loaded.quantization,
            hidden_size=self._head.hidden_size if self._head else 0,
            hidden_dtype=self._head.hidden_dtype if self._head else "",
        )

    async def score(self, sequence: Sequence, spec: ScoreSpec) -> Scores:
        """The scores of one sequence; batched with whatever else is submitted."""
        loop = asyncio.get_running_loop()
        job = ScoreJob(sequence, spec, loop, loop.create_future())
        self._running().submit(job)
        try:
            return await job.future
        finally:
            job.cancelled = True
            note(job.step)

    async def head(self, rows: int) -> AsyncIterator[Head]:
        """The LM head; Unsupported where the logits are not exactly its product with the hidden states."""
        self._running()
        if self._head is None:
            raise Unsupported("this model's logits are not its LM head times its hidden states")
        async for part in self._head.parts(rows):
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
        """Pieces of the n completions of int32[P]; Unsupported for a think budget where tags are not single tokens."""
        tags = self.tags_for(sampling)
        loop = asyncio.get_running_loop()
        job = GenerateJob(prompt_ids, sampling, n, logprobs, stream, loop, tags, alternatives, dropped)
        self._running().submit(job)
        try:
            while (answer := await job.answers.get()) is not None:
                if isinstance(answer, TeacherError):
                    raise answer
                yield answer
        finally:
            job.cancelled = True

    async def healthy(self) -> bool:
        """Whether the engine's thread still takes work."""
        return self._worker is not None and self._worker.alive

    async def close(self) -> None:
        """Stops the thread after the step that it is in, and frees the model."""
        worker, self._worker, self._head = self._worker, None, None
        if worker is not None:
            await asyncio.to_thread(worker.stop)
            del worker
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _running(self) -> Worker:
        if self._worker is None:
            raise Unavailable("the teacher is not running; try again in a while", retry_after_s=5.0)
        return self._worker


def _cache_tokens(loaded: LoadedModel, batch_tokens: int) -> int:
    """Positions whose keys and values generation may keep: half of a GPU's free memory, 4 batches on a CPU."""
    if loaded.device.type != "cuda":
        return 4 * batch_tokens
    config = loaded.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    position = 2 * config.num_hidden_layers * heads * width * torch.finfo(loaded.dtype).bits // 8
    free = min(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    return max(batch_tokens, int(free // 2 // position))
