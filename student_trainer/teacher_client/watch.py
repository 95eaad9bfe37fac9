"""Looks after replicas: asks all of them at the start who they are, and in a thread those that are down or left out.

A replica gets calls again once it answers and is the same teacher, so that no call pays for one that is still down.
Names are looked up again now and then, and when a replica went down. It knows no call of a trainer.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from protos import errors
from protos.scores import TeacherInfo
from student_trainer.teacher_client.replicas import Replica, Replicas

log = logging.getLogger(__name__)

ASK_S = 10.0
"""Seconds in which a replica has to say who it is."""
LOOK_UP_S = 30.0
"""Seconds after which names are looked up again."""
SOONEST_S, TICK_S = 2.0, 0.25
"""Seconds between look-ups where replicas go down, and between looks at what is due."""


def first_answer(replicas: Replicas, timeout_s: float) -> TeacherInfo:
    """Who the teacher is; TeacherMismatch where two replicas differ.

    Those that do not answer yet are asked again later. Where none does, the first is waited for.
    """
    if not replicas.several:
        return replicas.agree({"": replicas.call(0, lambda transport: transport.teacher(timeout_s))})
    infos: dict[str, TeacherInfo] = {}
    members = list(replicas.replicas)
    with ThreadPoolExecutor(max(1, len(members)), thread_name_prefix="teacher-first") as pool:
        asked = [pool.submit(replica.transport.teacher, min(ASK_S, timeout_s)) for replica in members]
    for replica, answer in zip(members, asked, strict=True):
        error = answer.exception()
        if error is None:
            infos[replica.transport.address] = answer.result()
        elif isinstance(error, errors.Unavailable | errors.Overloaded | errors.DeadlineExceeded):
            log.warning("%s does not answer yet: %s", replica.transport.address, error)
            replicas.block(replica, errors.Unavailable(str(error)))
        else:
            raise error
    if not infos:
        infos[""] = replicas.call(0, lambda transport: transport.teacher(timeout_s))
        for replica in members:
            replica.down = True  # whoever answered is asked once more
    return replicas.agree(infos)


class Watch:
    """The thread; it runs where there are several replicas, until they are closed."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._looked_up = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="teacher-watch", daemon=True)
        if replicas.several:
            self._thread.start()

    def join(self) -> None:
        """Returns once it has ended, which takes as long as a question that it is asking."""
        if self._thread.ident is not None:
            self._thread.join(ASK_S)

    def _run(self) -> None:
        replicas = self._replicas
        while not replicas.closed.is_set():
            with replicas.lock:
                busy = any(replica.down or replica.refused for replica in replicas.replicas)
            replicas.noticed.wait(TICK_S if busy else LOOK_UP_S)
            replicas.noticed.clear()
            since = time.monotonic() - self._looked_up
            if replicas.names and since > (SOONEST_S if busy else LOOK_UP_S):
                replicas.look_up()
                self._looked_up = time.monotonic()
            with replicas.lock:
                now = time.monotonic()
                due = [r for r in replicas.replicas if (r.down or r.refused) and r.blocked_until <= now]
            for replica in due:
                self._ask(replica)

    def _ask(self, replica: Replica) -> None:
        """Asks a replica who it is."""
        replicas = self._replicas
        try:
            info = replica.transport.teacher(ASK_S)
        except errors.TeacherError as error:
            if not replicas.closed.is_set():
                replicas.block(replica, error if error.retryable else errors.Unavailable(error.message))
            return
        if info.fingerprint == replicas.fingerprint:
            replicas.back(replica)
            log.info("%s answers and gets calls again", replica.transport.address)
        else:
            replicas.refuse(
                replica, f"it is {info.name} with fingerprint {info.fingerprint}, not {replicas.fingerprint}"
            )
