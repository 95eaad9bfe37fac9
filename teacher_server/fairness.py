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
from collections.abc import Collection
from dataclasses import dataclass

QUANTUM = 64.0
"""Tokens that a round gives to a waiting client of weight 1; small, so that order is fair within about one unit."""
MOST_CREDIT = 16_384.0
"""Tokens, times the weight, that a client can have to its credit: as many as an engine holds at a time, or so."""
LEAD = 2 * QUANTUM
"""Tokens, times the weight, that one client may be given in a full engine before another."""
LEAST_WEIGHT = 1e-3


@dataclass(eq=False)
class Account:
    """One client's credit in tokens, negative where it owes, and the numbers of its units that wait and that run."""

    weight: float
    credit: float = 0.0
    waiting: int = 0
    running: int = 0
    held: float = 0.0
    """Tokens for which its running units were charged when they began."""


class Ledger:
    """The accounts of all clients that wait, run or owe."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}

    def __len__(self) -> int:
        return len(self._accounts)

    def turns(self, names: Collection[str], yields: bool, full: bool = False) -> list[str]:
        """Those of `names`, which all wait for work of one kind, who may have a turn now: the next and who may pass it.

        The next is the first with credit. While there is no room for its unit, those with more credit for their weight
        pass, most first; the passed one's turn comes all the same, as no round begins before. Rounds begin when nobody
        who waits has credit, for work of whatever kind. Where all of `names` owe and somebody else, whose work has no
        room now, has credit, nobody may where they must yield, else who owes least: room is not left empty.
        Where the engine is `full`, whoever was given more may not also hold more of it, see `_served`.
        """
        served = {name for name in names if full and self._served(name)}
        names = [name for name in names if name not in served]
        others = [account for name, account in self._accounts.items() if name not in served]
        while names:
            standing = {name: self._accounts[name].credit / self._accounts[name].weight for name in names}
            first = next((name for name in names if standing[name] > 0), None)
            if first is not None:
                passing = [name for name in names if standing[name] > standing[first]]
                return [first, *sorted(passing, key=lambda name: -standing[name])]
            if any(account.waiting and account.credit > 0 for account in others):
                return [] if yields else [max(names, key=lambda name: standing[name])]
            self._rounds([account for account in others if account.waiting])
        return []

    def _served(self, name: str) -> bool:
        """Whether somebody else was given LEAD tokens less for their weight and has no more in the engine now.

        In a full engine whatever is added slows down that work, whose client has nothing that waits for a turn.
        """
        account = self._accounts[name]
        least = account.credit / account.weight + LEAD
        most = account.held / account.weight
        return any(
            other.running and other.credit / other.weight > least and other.held / other.weight <= most
            for other in self._accounts.values()
        )

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
        account.held += tokens
        account.credit -= tokens

    def charge(self, name: str, tokens: float) -> None:
        """Corrects what a running unit was charged; below 0 gives back."""
        self._accounts[name].credit -= tokens

    def ends(self, name: str, tokens: float) -> None:
        """A running unit ended, which began for `tokens`."""
        self._accounts[name].running -= 1
        self._accounts[name].held -= tokens
        self._forget(name)

    def _rounds(self, waiting: list[Account]) -> None:
        """As many rounds as it takes until somebody of those who wait, and all owe, has credit."""
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
