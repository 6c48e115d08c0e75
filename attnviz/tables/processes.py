"""The processes of torchrun, which share the pictures of a table.

Each measures every n-th of the batches that are still to be measured and keeps the records in a
file of its own. In the end all processes get all records through the process group, so machines
need no folder in common; who measured what has no influence on the table.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TypeVar

import torch
from torch import distributed

from ..training.runs import PATIENCE, all_answer

__all__ = ["Processes", "own_device", "processes"]

T = TypeVar("T")

_REMEDY = "start them again: what was measured is kept"
_LONGER = 20  # times its longest batch: so long a process waits for another's next one


@cache
def processes() -> "Processes":
    """Returns the processes that torchrun has made, or this one alone."""
    return Processes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def own_device(device: str | torch.device) -> torch.device:
    """Returns the device of this process: each of a machine has a GPU of its own."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        number = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
        return torch.device("cuda", number)
    return device


class Processes:
    """Several processes that do parts of one work.

    Args:
        rank: Number of this process.
        count: How many there are.
    """

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count, self._passes = rank, count, 0
        self._store = distributed.HashStore()
        if count == 1:
            return
        if not distributed.is_initialized():
            # a training that follows finds NCCL, too
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(backend)
        store, _, _ = next(distributed.rendezvous("env://", rank, count))
        self._store = distributed.PrefixStore("attnviz-tables", store)

    def answering(self) -> AbstractContextManager[None]:
        """Says in one line that another process has ended, where this one waits for it."""
        if self.count == 1:
            return nullcontext()
        return all_answer(self.count, _REMEDY)

    def gather(self, mine: T) -> list[T]:
        """Returns what every process gives, in the order of their numbers; all have to call it."""
        if self.count == 1:
            return [mine]
        found: list[T] = [mine] * self.count
        distributed.all_gather_object(found, mine)
        return found

    def once(self, name: str, make: Callable[[], object]) -> None:
        """Lets the first process make what all of them read from a common folder then.

        Args:
            name: Of what is made; another one each time.
            make: Makes it.
        """
        if self.rank == 0:
            make()
            self._store.add(name, 1)
        with self.answering():
            while not self._store.add(name, 0):
                time.sleep(0.2)

    def share(self, parts: Sequence[T]) -> Sequence[T]:
        """Begins a pass over parts, the same ones in every process; returns those of this one."""
        self._passes += 1
        self._wanted = [len(parts[rank :: self.count]) for rank in range(self.count)]
        self._longest, self._since = 0.0, time.monotonic()
        return parts[self.rank :: self.count]

    def advance(self) -> int:
        """Says that this process has done a part; returns how many are done, by all."""
        now = time.monotonic()
        self._longest, self._since = max(self._longest, now - self._since), now
        self._store.add(self._key(self.rank), 1)
        return sum(self._done())

    def wait(self, show: Callable[[int, str], object]) -> None:
        """Waits until all parts of the pass are done.

        It waits for as long as the others go on, however much slower they are: a process counts
        as lost after ten minutes without a part done, or twenty times the longest of this one.

        Args:
            show: Is told how many parts are done and who is waited for.

        Raises:
            ConnectionError: Another process is lost.
        """
        patience = max(PATIENCE.total_seconds(), _LONGER * self._longest)
        before, since = self._done(), time.monotonic()
        while (done := self._done()) != self._wanted:
            late = [str(rank) for rank in range(self.count) if done[rank] < self._wanted[rank]]
            if done != before:
                before, since = done, time.monotonic()
            if time.monotonic() - since > patience:
                raise ConnectionError(
                    f"expected {self.count} processes, got nothing from number {', '.join(late)} "
                    f"for {patience / 60:.0f} minutes; {_REMEDY}"
                )
            show(sum(done), f"waiting for process {', '.join(late)}")
            time.sleep(0.2)
        show(sum(done), "")

    def _key(self, rank: int) -> str:
        return f"{self._passes}/{rank}"

    def _done(self) -> list[int]:
        return [self._store.add(self._key(rank), 0) for rank in range(self.count)]
