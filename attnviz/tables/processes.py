"""The processes of torchrun, which share the pictures of a table.

Of a measurement each takes every n-th of the batches that are still to be measured and keeps the
records in a file of its own. In the end all processes get all records through the process group,
so machines need no folder in common. Of trainings each takes the next one that nobody has begun,
in a folder that all see. Who did what has no influence on the table.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TypeVar

import torch
from torch import distributed
from tqdm import tqdm

from ..training.runs import PATIENCE, all_answer, by_itself

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

    def each(self, jobs: Sequence[Callable[[], T]], progress: bool = False) -> list[T]:
        """Does jobs, each in the first process that is free for it, and returns what they give.

        All processes have to call it with the same jobs. A training inside is one of that
        process alone, so that what it gives does not depend on how many there are.

        Args:
            jobs: They give what can be pickled.
            progress: Whether to show a bar while this process waits for others.

        Raises:
            Exception: That of a job, in all processes.
        """
        if self.count == 1:
            return [job() for job in jobs]
        self._passes += 1
        mine: dict[int, T] = {}
        error: Exception | None = None
        with by_itself(), self.answering():
            for place, job in enumerate(jobs):
                if self._add("failed", 0) or self._add(f"job {place}") > 1:
                    continue
                try:
                    mine[place] = job()
                except ConnectionError:  # another process has ended
                    raise
                except Exception as found:  # raised below, when all know of it
                    error = found
                    self._add("failed")
                self._add("done")
            self._add("ready")
            with tqdm(
                total=len(jobs), desc="waiting for other processes", delay=2, disable=not progress
            ) as bar:
                while self._add("ready", 0) < self.count:
                    bar.update(self._add("done", 0) - bar.n)
                    time.sleep(0.2)
        parts = self.gather((mine, error))
        errors = [found for _, found in parts if found is not None]
        if error is None or isinstance(error, _Elsewhere):
            error = next((each for each in errors if not isinstance(each, _Elsewhere)), error)
        if error is not None:
            raise error
        found = {place: value for values, _ in parts for place, value in values.items()}
        return [found[place] for place in range(len(jobs))]

    def once(self, name: str, make: Callable[[], object]) -> None:
        """Lets the first process that gets here make what jobs share; others wait until it is.

        Args:
            name: Of what is made.
            make: Makes it, in a folder that all processes see.
        """
        if self.count == 1:
            make()
        elif self._add(f"{name} begun") == 1:
            try:
                make()
            except Exception:
                self._add(f"{name} failed")
                raise
            self._add(f"{name} made")
        else:
            while not self._add(f"{name} made", 0):
                if self._add(f"{name} failed", 0):
                    raise _Elsewhere(name)
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
        self._add(str(self.rank))
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

    def _done(self) -> list[int]:
        return [self._add(str(rank), 0) for rank in range(self.count)]

    def _add(self, name: str, number: int = 1) -> int:
        # A count of this pass, which all processes have in common.
        return self._store.add(f"{self._passes}/{name}", number)


class _Elsewhere(Exception):
    # Another process could not make what a job needs; it says why.
    pass
