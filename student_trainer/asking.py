"""Asks several teachers for completions at the same time, as one call that answers in one thread.

Knows the clients and nothing of what the completions are for.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from protos.scores import Completion, Prompt, Sampling

from .teachers import Teacher

Keep = Callable[[int, int, Completion], None]
"""(prompt, sample, completion): is told of each as it ends."""


class _Stopped(Exception):
    """Whoever asked has gone."""


def ask(
    groups: Sequence[tuple[Teacher, Sequence[int]]], prompts: Sequence[Prompt], sampling: Sampling, n: int, keep: Keep
) -> None:
    """`n` completions of each prompt from its teacher: `groups` has the places in `prompts` that are each one's.

    `keep` is called in this thread, in any order. Raises the first error of any teacher, and what `keep` raises.
    """

    def generate(teacher: Teacher, places: Sequence[int], done: Keep) -> None:
        own = [prompts[i] for i in places]
        teacher.client.generate(own, sampling, n=n, on_completion=lambda i, s, c: done(places[i], s, c))

    if len(groups) == 1:
        generate(*groups[0], keep)
        return
    arrived: queue.SimpleQueue[tuple[int, int, Completion] | BaseException | None] = queue.SimpleQueue()
    stopped = threading.Event()

    def done(prompt: int, sample: int, completion: Completion) -> None:
        if stopped.is_set():
            raise _Stopped
        arrived.put((prompt, sample, completion))

    def work(teacher: Teacher, places: Sequence[int]) -> None:
        try:
            generate(teacher, places, done)
            arrived.put(None)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that asked
            arrived.put(error)

    # A thread that is left behind ends with its next completion, or when its client is closed.
    for group in groups:
        threading.Thread(target=work, args=group, name="asking", daemon=True).start()
    running = len(groups)
    try:
        while running:
            item = arrived.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                keep(*item)
    finally:
        stopped.set()
