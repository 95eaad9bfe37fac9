"""Whose turn it is: deficit round robin on tokens, one account a client over all kinds of work.

In each round every client that has work is credited QUANTUM tokens times its weight, and whoever has credit may have a
turn, one unit at a time, which is charged when it begins and may overdraw the account. (Shreedhar and Varghese,
"Efficient fair queuing using deficit round robin", 1996; charging after the turn is the form of Adiseshu, Parulkar and
Varghese, "A reliable and scalable striping protocol", 1996, which needs no cost in advance: what a generation costs
shows at its end.) A client that sends one call after the other has work without a break: while the engine has its last
one it goes on being credited, or it would lose a turn each time to those who keep a queue. The credit and the debt of
an idle client go to 0 as rounds go by. It knows neither units nor queues.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

QUANTUM = 64.0
"""Tokens that a round gives to a waiting client of weight 1; small, so that order is fair within about one unit."""
MOST_CREDIT = 16_384.0
"""Tokens, times the weight, that a client can have to its credit: as many as an engine holds at a time, or so."""
LEAST_WEIGHT = 1e-3


@dataclass(eq=False)
class Account:
    """One client's credit in tokens, negative where it owes, and the numbers of its units that wait and that run."""

    weight: float
    credit: float = 0.0
    waiting: int = 0
    running: int = 0


class Ledger:
    """The accounts of all clients that wait, run or owe."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}

    def __len__(self) -> int:
        return len(self._accounts)

    def turns(self, names: Iterable[str], yields: bool, full: bool = False) -> list[str]:
        """Those of `names`, which all wait for work of one kind, who may have a turn now: the next and who may pass it.

        The next is the first with credit. While there is no room for its unit, those with more credit for their weight
        pass, most first; the passed one's turn comes all the same, as no round begins before. Rounds begin when nobody
        who waits has credit, for work of whatever kind. Where all of `names` owe and somebody else, whose work has no
        room now, has credit, nobody may where they must yield, else who owes least: room is not left empty.
        Nor may anybody who owes where the engine is `full` and somebody whose work it has is in credit: what is added
        then is taken from those, who keep too little submitted to have a queue of their own.
        """
        names = list(names)
        while True:
            standing = {name: self._accounts[name].credit / self._accounts[name].weight for name in names}
            first = next((name for name in names if standing[name] > 0), None)
            if first is not None:
                passing = [name for name in names if standing[name] > standing[first]]
                return [first, *sorted(passing, key=lambda name: -standing[name])]
            ahead = [account for account in self._accounts.values() if account.credit > 0]
            if full and any(account.running for account in ahead):
                return []
            if any(account.waiting for account in ahead):
                return [] if yields else [max(names, key=lambda name: standing[name])]
            self._rounds()

    def waits(self, name: str, weight: float) -> None:
        """One more unit of the client waits; its weight is the last one told."""
        account = self._accounts.setdefault(name, Account(weight))
        account.weight = max(LEAST_WEIGHT, weight)
        account.waiting += 1

    def leaves(self, name: str) -> None:
        """One unit waits no more, and did not run at this client's expense."""
        self._accounts[name].waiting -= 1
        self._forget(name)

    def begins(self, name: str, tokens: float) -> None:
        """One waiting unit runs, for `tokens`."""
        account = self._accounts[name]
        account.waiting -= 1
        account.running += 1
        account.credit -= tokens

    def charge(self, name: str, tokens: float) -> None:
        """Corrects what a running unit was charged; below 0 gives back."""
        self._accounts[name].credit -= tokens

    def ends(self, name: str) -> None:
        """A running unit ended."""
        self._accounts[name].running -= 1
        self._forget(name)

    def _rounds(self) -> None:
        """As many rounds as it takes until somebody who waits has credit."""
        waiting = [account for account in self._accounts.values() if account.waiting]
        count = min(math.floor(-account.credit / (QUANTUM * account.weight)) + 1 for account in waiting)
        for name, account in tuple(self._accounts.items()):
            gain = count * QUANTUM * account.weight
            if account.waiting or account.running:
                account.credit = min(account.credit + gain, max(account.credit, MOST_CREDIT * account.weight))
            else:
                account.credit = min(0.0, account.credit + gain) + max(0.0, account.credit - gain)
                self._forget(name)

    def _forget(self, name: str) -> None:
        """Drops accounts that say nothing any more: square and idle, or all, where nobody is left to be compared to."""
        account = self._accounts[name]
        if account.waiting or account.running:
            return
        if account.credit == 0:
            del self._accounts[name]
        elif not any(other.waiting or other.running for other in self._accounts.values()):
            self._accounts.clear()
