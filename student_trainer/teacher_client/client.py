"""The client that trainers and notebooks use: whole calls of any size in, results in order out.

It splits calls by the teacher's limits, keeps a bounded number of them in flight, and stays with one fingerprint.
Retries and the choice of a replica are in replicas.py, one attempt in a transport. It needs no torch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from types import TracebackType

from protos import errors
from protos.head import Head
from protos.scores import Completion, Prompt, Sampling, ScoreRequest, Scores, ScoreSpec, TeacherInfo
from protos.scores import Sequence as TokenSequence
from student_trainer.teacher_client import heads, splitting
from student_trainer.teacher_client.credentials import Credentials
from student_trainer.teacher_client.generation import PieceCollector
from student_trainer.teacher_client.names import Name, Resolve, is_name, resolve
from student_trainer.teacher_client.openai_model import StockModel
from student_trainer.teacher_client.replicas import Replicas, ReplicaStatus
from student_trainer.teacher_client.tracing import NO_TRACER, Tracer, here
from student_trainer.teacher_client.transport import Transport, open_transport
from student_trainer.teacher_client.watch import Watch, first_answer


def connect(
    address: str | Sequence[str],
    *,
    timeout_s: float = 600,
    patience_s: float = 60,
    max_in_flight: int = 4,
    name: str = "",
    on_wait: Callable[[str], None] | None = None,
    credentials: Credentials | None = None,
    resolve: Resolve = resolve,
    tracer: Tracer = NO_TRACER,
    stock: StockModel | None = None,
) -> TeacherClient:
    """A client of the teacher at `host:port`, `grpc://host:port` or `http://host:port`, or of replicas of one teacher.

    Replicas are a list of addresses, or one `dns://name:port` (gRPC) or `dns+http://name:port` each of whose addresses
    is one, looked up by `resolve` now and again. They must be one teacher: TeacherMismatch names those that are not.

    Asks the teacher who it is and remembers its fingerprint. `timeout_s` is the time of one attempt, `patience_s` how
    long a teacher that is down, loading or overloaded is waited for, `max_in_flight` the number of calls at the same
    time, `name` what the teacher knows this client by (its queue is fair between names). `on_wait` gets a line, in any
    thread, each time that something is waited for. `credentials` are files with a key and for TLS, which the addresses
    grpcs://host:port and https://host:port want. `tracer` makes a span of each call and names it to the teacher. With
    `stock` the addresses are stock vLLM or SGLang servers of that model, which score at temperature 1 alone. Raises
    Unavailable where nobody answers, ValueError for an address that is none.
    """
    addresses = [address] if isinstance(address, str) else list(address)
    names = [Name(a, name, credentials, resolve, stock) for a in addresses if is_name(a)]
    transports = [open_transport(a, name, credentials, stock=stock) for a in addresses if not is_name(a)]
    replicas = Replicas(transports, patience_s, on_wait, names)
    client = TeacherClient(replicas, timeout_s=timeout_s, max_in_flight=max_in_flight, tracer=tracer)
    try:
        client.teacher()
    except BaseException:
        client.close()
        raise
    return client


class TeacherClient:
    """Calls one teacher, however many servers run it; see `connect`. All methods may be called from several threads.

    Every method raises the tree of `protos.errors`: TeacherMismatch once another teacher answers than the first time.
    An error's `index` is that of the caller's list, whatever was split.
    """

    def __init__(self, replicas: Replicas, *, timeout_s: float, max_in_flight: int, tracer: Tracer = NO_TRACER) -> None:
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight must be at least 1, got {max_in_flight}")
        self._replicas = replicas
        self._timeout_s = timeout_s
        self._tracer = tracer
        self._info: TeacherInfo | None = None
        self._watch: Watch | None = None
        self._head: Head | None = None
        self._lock = threading.Lock()
        self._head_lock = threading.Lock()
        self._pool = ThreadPoolExecutor(max_in_flight, thread_name_prefix="teacher-client")

    def teacher(self, refresh: bool = False) -> TeacherInfo:
        """Who the teacher is, as it said first; `refresh` asks again (TeacherMismatch if it is another one now)."""
        with self._lock:
            if self._info is None or refresh:
                if self._info is None:
                    self._info = first_answer(self._replicas, self._timeout_s)
                    self._watch = Watch(self._replicas)
                    return self._info
                info = self._replicas.call(0, lambda transport: transport.teacher(self._timeout_s))
                if info.fingerprint != self._info.fingerprint:
                    raise errors.TeacherMismatch(
                        f"the teacher was {self._info.name} with fingerprint {self._info.fingerprint}, now it is"
                        f" {info.name} with fingerprint {info.fingerprint}"
                    )
                self._info = info
            return self._info

    def replicas(self) -> list[ReplicaStatus]:
        """How each server of the teacher fares, as this client sees it."""
        return self._replicas.status()

    def score(self, sequences: Sequence[TokenSequence], spec: ScoreSpec | None = None) -> list[Scores]:
        """The teacher's scores of each sequence, in order. None scores tokens and log-normaliser alone."""
        future = self.submit_score(sequences, spec)
        try:
            return future.result()
        finally:
            future.cancel()

    def submit_score(self, sequences: Sequence[TokenSequence], spec: ScoreSpec | None = None) -> Future[list[Scores]]:
        """`score` as a future. At most `max_in_flight` calls are on the wire; later ones wait in order.

        Cancelling the future drops its calls that have not begun.
        """
        sequences, info, spec = tuple(sequences), self.teacher(), spec or ScoreSpec()
        outer: Future[list[Scores]] = Future()
        most = splitting.hidden_tokens(info, spec)
        pieces = splitting.score_pieces(sequences, info.limits, len(self._replicas), most)
        if not pieces:
            outer.set_result([])
            return outer
        request = partial(self._score_piece, sequences, spec, info.fingerprint)
        _gather([self._pool.submit(here(request, piece)) for piece in pieces], outer)
        return outer

    def _score_piece(
        self, sequences: tuple[TokenSequence, ...], spec: ScoreSpec, fingerprint: str, piece: range
    ) -> list[Scores]:
        request = ScoreRequest(sequences[piece.start : piece.stop], spec, fingerprint)
        try:
            about = {"sequences": len(request.sequences), "tokens": request.tokens}
            with self._tracer.span("teacher.score", about):
                return self._replicas.call(request.tokens, lambda t: t.score(request, self._timeout_s))
        except errors.TeacherError as error:
            raise splitting.renumbered(error, piece) from error

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        n: int = 1,
        logprobs: bool = False,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """`n` completions of each prompt, in order: result[prompt][sample].

        `on_completion(prompt_index, sample_index, completion)` is called in this thread as they end, in any order.
        After a failure on the way only what is missing is asked for again.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        prompts, info = tuple(prompts), self.teacher()
        found: dict[tuple[int, int], Completion] = {}
        arrived: queue.SimpleQueue[tuple[int, int, Completion] | errors.TeacherError | BaseException | None]
        arrived = queue.SimpleQueue()
        futures: list[Future[None]] = []
        first_sample = 0
        for part in splitting.sample_pieces(n, info.limits):
            for piece in splitting.prompt_pieces(prompts, part, info.limits):
                collector = PieceCollector(
                    prompts[piece.start : piece.stop], piece, part, first_sample, lambda *found: arrived.put(found)
                )
                own = splitting.reseeded(sampling, first_sample)
                future = self._pool.submit(here(self._generate_piece, collector, own, logprobs, info.fingerprint))
                future.add_done_callback(lambda f: arrived.put(None if f.cancelled() else f.exception()))
                futures.append(future)
            first_sample += part
        running = len(futures)
        try:
            while running:
                item = arrived.get()
                if isinstance(item, tuple):
                    found[item[:2]] = item[2]
                    if on_completion is not None:
                        on_completion(*item)
                elif item is None:
                    running -= 1
                else:
                    raise item
        finally:
            for future in futures:
                future.cancel()
        return [[found[prompt, sample] for sample in range(n)] for prompt in range(len(prompts))]

    def _generate_piece(self, collector: PieceCollector, sampling: Sampling, logprobs: bool, fingerprint: str) -> None:
        def attempt(transport: Transport) -> None:
            request = collector.request(sampling, logprobs, fingerprint)
            with closing(transport.generate(request, self._timeout_s)) as stream:
                collector.collect(stream)

        cost = collector.tokens(sampling.max_tokens)
        try:
            with self._tracer.span("teacher.generate", {"prompts": len(collector.asked_indexes), "tokens": cost}):
                self._replicas.call(cost, attempt, lambda: collector.finished)
        except errors.TeacherError as error:
            raise splitting.renumbered(error, collector.asked_indexes) from error

    def head(self, cache: Path | None = None) -> Head:
        """The teacher's LM head, which turns hidden states into logits (see `protos.head.logits`).

        Fetched once by this client and held in memory; with a folder `cache`, fetched once by all clients that name it,
        kept there and mapped from it. Unsupported where the teacher offers none.
        """
        info = self.teacher()
        with self._head_lock:
            if self._head is None and cache is not None:
                self._head = heads.load(cache, info)
            if self._head is None:
                self._head = self._replicas.call(info.vocab_size, lambda t: self._fetch_head(t, info, cache))
            return self._head

    def _fetch_head(self, transport: Transport, info: TeacherInfo, cache: Path | None) -> Head:
        with closing(transport.head(info.fingerprint, self._timeout_s)) as parts:
            return heads.assemble(parts, info) if cache is None else heads.store(cache, info, parts)

    def close(self) -> None:
        """Ends calls in flight, whose callers get Unavailable, and all connections."""
        self._replicas.close()
        if self._watch is not None:
            self._watch.join()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> TeacherClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _gather(pieces: list[Future[list[Scores]]], outer: Future[list[Scores]]) -> None:
    """Gives `outer` the joined results of `pieces`, or the first error; cancels what has not begun then."""
    lock = threading.Lock()
    left, ended = len(pieces), False

    def done(piece: Future[list[Scores]]) -> None:
        nonlocal left, ended
        with lock:
            left -= 1
            failure = errors.Unavailable("the client was closed") if piece.cancelled() else piece.exception()
            if ended or not (failure or left == 0):
                return
            ended = True
        if not outer.set_running_or_notify_cancel():
            return
        if failure is not None:
            outer.set_exception(failure)
            for other in pieces:
                other.cancel()
        else:
            outer.set_result([scores for finished in pieces for scores in finished.result()])

    outer.add_done_callback(lambda f: [piece.cancel() for piece in pieces] if f.cancelled() else None)
    for piece in pieces:
        piece.add_done_callback(done)
