"""Whose turn it is: deficit round robin on tokens, one account a client over all kinds of work.

In each round every client that waits is credited QUANTUM tokens times its weight, and whoever has credit may have a
turn, one unit at a time, which is charged when it begins and may overdraw the account. (Shreedhar and Varghese,
"Efficient fair queuing using deficit round robin", 1996; charging after the turn is the form of Adiseshu, Parulkar and
Varghese, "A reliable and scalable striping protocol", 1996, which needs no cost in advance: what a generation costs
shows at its end.) A client that does not wait gathers no credit, but pays its debt as rounds go by. It knows neither
units nor queues.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

QUANTUM = 64.0
"""Tokens that a round gives to a waiting client of weight 1; small, so that order is fair within about one unit."""
LEAST_WEIGHT = 1e-3


@dataclass(eq=False)
class Account:
    """One client's credit in tokens, negative where it owes, and its units that wait and that run."""

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

    def turn(self, names: Iterable[str]) -> str:
        """The one of `names`, which all wait for work of one kind, whose turn it is; the first with credit.

        Rounds begin when nobody who waits has credit, for work of whatever kind. Where all of `names` owe and somebody
        else, whose work has no room now, has credit, room is not left empty: the one goes on who owes least.
        """
        names = list(names)
        while True:
            for name in names:
                if self._accounts[name].credit > 0:
                    return name
            if any(account.waiting and account.credit > 0 for account in self._accounts.values()):
                return max(names, key=lambda name: self._accounts[name].credit / self._accounts[name].weight)
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
            account.credit += count * QUANTUM * account.weight
            if not account.waiting:
                account.credit = min(0.0, account.credit)
                self._forget(name)

    def _forget(self, name: str) -> None:
        """Drops accounts that say nothing any more: square and idle, or all, where nobody is left to be compared to."""
        account = self._accounts[name]
        if account.waiting or account.running:
            return
        if account.credit >= 0:
            del self._accounts[name]
        elif not any(other.waiting or other.running for other in self._accounts.values()):
            self._accounts.clear()
