"""A running vLLM engine: prompts in, arrays out, and its errors as ours. Knows vLLM's Python face, no service.

`AsyncLLM` runs the engine in processes of its own; this object lives on the event loop. Legend: N tokens of a prompt,
R new tokens, K alternatives.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from protos.errors import TeacherError, TeacherFailed, Unavailable
from protos.scores import Floats, Ids, Sampling
from teacher_server.backends import vllm_tap
from teacher_server.backends.bits import dtype_name
from teacher_server.backends.vllm_meter import Meter

RETRY_S = 5.0
CLOSE_S = 20.0
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
"""What vLLM samples at, beside 0; it would raise a lower temperature without a word and refuses a higher one."""


@dataclass(frozen=True)
class Tokens:
    """New tokens int32[R] of one completion, float32[R] or None, and "stop", "length" or "" (it goes on).

    `top_ids` int32[R,K] and `top_logprobs` float32[R,K] where alternatives are wanted.
    """

    ids: Ids
    logprobs: Floats | None
    ended: str
    top_ids: Ids | None = None
    top_logprobs: Floats | None = None


def set_environment() -> None:
    """What vLLM reads when it is imported: it may not fork a process that runs gRPC, and it tells nobody about us."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


class Engine:
    """Made by `start`; every method may raise Unavailable once the engine has died."""

    def __init__(self, llm: Any, kept: bool) -> None:
        self._llm: Any = llm
        self._serial = itertools.count()
        self.keeps_tensors = kept
        """Whether log-probabilities of prompts arrive as tensors."""
        self.steps = 0
        """Outputs of steps that have arrived."""
        self.meter = Meter()
        self._count_steps()

    @staticmethod
    def start(args: Any) -> Engine:
        """Starts the engine's processes and loads the model; takes minutes, so call it in a thread."""
        from vllm.v1.engine.async_llm import AsyncLLM

        kept = vllm_tap.install()
        return Engine(AsyncLLM.from_engine_args(args), kept)

    def _count_steps(self) -> None:
        core = self._llm.engine_core
        receive = core.get_output_async

        async def receive_and_count() -> Any:
            outputs = await receive()
            self.steps += 1
            self.meter.arrived(outputs.outputs)
            return outputs

        core.get_output_async = receive_and_count

    @property
    def config(self) -> Any:
        """The VllmConfig as the engine resolved it."""
        return self._running().vllm_config

    @property
    def dtype(self) -> str:
        """Name of the dtype in which it computes."""
        return dtype_name(self.config.model_config.dtype)

    @property
    def alive(self) -> bool:
        """Whether its processes run."""
        return self._llm is not None and not self._llm.errored

    async def call(self, method: str, *arguments: Any) -> list[Any]:
        """What a method of TeacherWorker gives in each worker."""
        with self._errors():
            return list(await self._running().collective_rpc(method, args=arguments))

    async def ask(self, token_ids: Ids, extra_args: dict[str, Any] | None, **options: Any) -> Any:
        """The output of one prompt int32[N] that is read and not continued; `options` are SamplingParams' own."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            **{"prompt_logprobs": 0} | options,
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=extra_args,
        )
        output, name = None, self._name()
        with self._errors(), self.meter.scoring(name, len(token_ids)):
            async for part in self._running().generate(_prompt(token_ids), params, name):
                output = part
        if output is None:
            raise TeacherFailed from RuntimeError("the engine ended a prompt without an output")
        return output

    async def complete(
        self,
        token_ids: Ids,
        sampling: Sampling,
        *,
        stops: list[int],
        most: int,
        seed: int | None,
        logprobs: bool,
        stream: bool,
        alternatives: int = 0,
    ) -> AsyncGenerator[Tokens, None]:
        """One completion of int32[N], at most `most` tokens, ended by any of `stops`; stops when it is closed."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=most,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_token_ids=stops,
            ignore_eos=True,  # the model's own ids are among `stops`
            seed=seed,
            logprobs=alternatives if logprobs else None,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        )
        outputs = self._running().generate(_prompt(token_ids), params, self._name())
        try:
            with self._errors(), self.meter.generating():
                async for output in outputs:
                    part = output.outputs[0]
                    if part.finish_reason not in (None, "stop", "length"):
                        raise TeacherFailed from RuntimeError(f"the engine ended a completion: {part.finish_reason}")
                    yield _tokens(part, logprobs, alternatives)
        finally:
            await outputs.aclose()

    async def close(self) -> None:
        """Ends the engine's processes; those that do not end in CLOSE_S seconds are killed."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        handler = llm.output_handler
        if handler is not None:
            handler.cancel()  # it would log the end of the processes as an error
        await asyncio.to_thread(llm.shutdown, timeout=CLOSE_S)

    def _running(self) -> Any:
        if self._llm is None:
            raise Unavailable("the engine was stopped; retry later", retry_after_s=RETRY_S)
        return self._llm

    def _name(self) -> str:
        return str(next(self._serial))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except TeacherError:
            raise
        except Exception as error:
            if isinstance(error, EngineDeadError) or not self.alive:
                raise Unavailable("the engine died; it is started again, retry later", retry_after_s=RETRY_S) from error
            raise TeacherFailed from error


def _tokens(part: Any, logprobs: bool, alternatives: int) -> Tokens:
    """Arrays of an output's lists; in these the token itself stands before its K alternatives."""
    ids, ended = np.array(part.token_ids, dtype=np.int32), part.finish_reason or ""
    if not logprobs:
        return Tokens(ids, None, ended)
    width = 1 + alternatives
    numbers = np.array(part.logprobs.logprobs, dtype=np.float32).reshape(len(ids), width)
    if not alternatives:
        return Tokens(ids, numbers[:, 0], ended)
    named = np.array(part.logprobs.token_ids, dtype=np.int32).reshape(len(ids), width)
    return Tokens(ids, numbers[:, 0], ended, named[:, 1:], numbers[:, 1:])


def _prompt(token_ids: Ids) -> Any:
    # vLLM takes a list, once a prompt.
    return {"prompt_token_ids": token_ids.tolist()}
