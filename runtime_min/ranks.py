"""Several devices run one model: a process each, all executing the same schedule on their own shares.

Rank 0 is the process that the user started. It owns requests, sampling and results; the others follow: they
are told what rank 0 takes in and which tokens it accepts, and come to the same pass each time. Results of
their shares are summed where a row of the first lane needs them, so all ranks meet in the same order.

Over accelerators (never run on any yet) torch's own backend sums; on CPUs, and for what ranks tell each
other, gloo does.

T tokens
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from moeplan.runtime_min.errors import RunError
from moeplan.runtime_min.plan_file import RuntimePlan, load
from moeplan.runtime_min.sampling import Sampling
from moeplan.runtime_min.shares import Share

if TYPE_CHECKING:
    from moeplan.runtime_min.engine import Generation

_CPU = torch.device("cpu")
_PRELOADED = ["moeplan.runtime_min.offload", "torch.distributed", "numba"]  # once for all ranks
_LEFT, _REFUSED = 3, 2  # exit codes: another rank was lost; the rank cannot run, and has said why
_MEMORY = "if the system ended it for want of memory, its log says so"
_GRACE_S = 5.0  # in which rank 0 notices by itself that another rank is lost


class RankError(RunError):
    """Another rank is lost."""


class Ranks:
    """One rank's way to the others. Alone it sums and tells nothing."""

    def __init__(self, share: Share = Share(), device: torch.device = _CPU, store: Any = None) -> None:
        self.share, self.device, self._store = share, device, store
        self.others: Sequence[BaseProcess] = ()
        self.figures: list[Any] = []  # of each rank, once a run is complete
        if store is not None:
            kinds = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{_backend(device)}"
            with self._together():
                dist.init_process_group(kinds, store=store, rank=share.rank, world_size=share.ranks)

    @property
    def leads(self) -> bool:
        return self.share.rank == 0

    @property
    def count(self) -> int:
        return self.share.ranks

    def sum(self, x: Tensor) -> Tensor:
        """`x` becomes the sum over all ranks, the same on each."""
        if self.count > 1 and x.numel():
            with self._together():
                dist.all_reduce(x)
        return x

    def collect(self, x: Tensor) -> None:
        """Rank 0's `x` becomes the sum over all ranks; what others keep is undefined."""
        if self.count > 1:
            with self._together():
                dist.reduce(x, 0)

    def requests(self, given: Iterable[Generation]) -> Iterator[Generation]:
        """Rank 0's requests, on every rank."""
        from moeplan.runtime_min.engine import Generation

        if self.count == 1:
            yield from given
        elif self.leads:
            for generation in given:
                self._tell((generation.prompt, generation.max_tokens))
                yield generation
            self._tell(None)
        else:
            while (told := self._tell(None)) is not None:
                yield Generation(*told, Sampling(0.0, 1.0, 0))

    def agree(self, generations: Sequence[Generation]) -> None:
        """Let `generations` end as rank 0's, which have taken a token each, or ended without."""
        if self.count == 1:
            return
        told = self._tell([(g.tokens[-1:], g.finish) for g in generations] if self.leads else None)
        for generation, (last, finish) in zip(generations, told, strict=True):
            if not self.leads:
                generation.finish = finish
                generation.tokens += last if finish != "invalid" else []

    def gather(self, figures: Any) -> None:
        """Keep in `figures` those of all ranks, on rank 0."""
        self.figures = [figures]
        if self.count > 1:
            self.figures *= self.count
            with self._together():
                dist.all_gather_object(self.figures, figures)

    def _tell(self, what: Any) -> Any:
        """Rank 0's `what`, on every rank."""
        told = [what]
        with self._together():
            dist.broadcast_object_list(told, 0, device=_CPU)
        return told[0]

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What ranks do at once; raises RankError where one is lost."""
        try:
            yield
        except RuntimeError as error:
            raise self._lost(str(error)) from None

    def _lost(self, error: str) -> RankError:
        """Which rank is lost and why, as far as rank 0 can see within a moment."""
        end = time.monotonic() + _GRACE_S
        while self.others and time.monotonic() < end:
            for process in self.others:
                if process.exitcode == _REFUSED and self._store.check(["refusal"]):
                    return RankError(*self._store.get("refusal").decode().split("\0"))
                if process.exitcode not in (None, _LEFT):
                    how = _ended(process.exitcode)
                    return RankError(f"{process.name} of {self.count} is lost: it {how}", _MEMORY)
            time.sleep(0.01)
        return RankError(f"a rank cannot be reached: {error.splitlines()[0]}")

    def refuse(self, error: RunError) -> None:
        """Leave for rank 0 why this one cannot run."""
        self._store.set("refusal", f"{error}\0{error.hint}")


ALONE = Ranks()


@contextmanager
def started(folder: Path, plan: RuntimePlan, checkpoint: Path, rehearse: bool) -> Iterator[Ranks]:
    """Rank 0 of the plan's, with the others started; they end with it."""
    count = plan.offload.gpus
    if count <= 1:
        yield Ranks(device=device_of(0, rehearse or plan.device == "cpu"))
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory(prefix="moeplan-ranks-") as meeting:
        given = (folder, checkpoint, rehearse, meeting)
        others = [
            context.Process(target=_follow, args=(rank, *given), name=f"rank {rank}", daemon=True)
            for rank in range(1, count)
        ]
        ended = threading.Event()
        try:
            for process in others:
                process.start()
            threading.Thread(target=_watch, args=(others, ended), daemon=True).start()
            ranks = Ranks(Share(0, count), device_of(0, rehearse), _meet(meeting, count))
            ranks.others = others
            yield ranks
        finally:
            ended.set()
            for process in others:
                process.kill()
            for process in others:
                process.join()
            if dist.is_initialized():
                dist.destroy_process_group()


def _follow(rank: int, folder: Path, checkpoint: Path, rehearse: bool, meeting: str) -> None:
    """The life of another rank: run what rank 0 runs, until that ends."""
    from moeplan.runtime_min.offload import Offload

    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all; rank 0 decides what follows
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_rank_0, daemon=True).start()
    code, ranks = 1, None
    try:
        plan = load(folder)
        count = plan.offload.gpus
        device = device_of(rank, rehearse)
        ranks = Ranks(Share(rank, count), device, _meet(meeting, count))
        with Offload(folder, plan, checkpoint, device, ranks) as engine:
            while True:
                engine.run(())
    except RankError:
        code = _LEFT
    except RunError as error:
        code = _REFUSED
        if ranks:
            ranks.refuse(error)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)  # no thread of a lane holds it up


def _meet(folder: str, count: int) -> Any:
    """Where ranks find each other: a file, so that no port is open to other machines."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return dist.FileStore(str(Path(folder, "ranks")), count)


def device_of(rank: int, rehearse: bool) -> torch.device:
    """The accelerator of a rank, or the CPU in its place."""
    kind = None if rehearse else torch.accelerator.current_accelerator()
    if kind is None:
        return _CPU
    torch.accelerator.set_device_index(rank)
    return torch.device(kind.type, rank)


def _backend(device: torch.device) -> str:
    return str(dist.get_default_backend_for_device(device.type))


def _leave_with_rank_0() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(_LEFT)


def _watch(others: Sequence[BaseProcess], ended: threading.Event) -> None:
    """End rank 0 where it does not notice by itself that another is lost: some backends wait forever."""
    wait([process.sentinel for process in others])
    if not ended.wait(2 * _GRACE_S):
        print("a rank is lost, and rank 0 waits for it\n  hint: start the run again", file=sys.stderr)
        sys.stderr.flush()
        os._exit(_REFUSED)


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with {code}"
