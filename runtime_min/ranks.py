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
from moeplan.runtime_min.report import RankReport
from moeplan.runtime_min.sampling import Sampling
from moeplan.runtime_min.shares import Share

if TYPE_CHECKING:
    from moeplan.runtime_min.engine import Generation

_CPU, _WHOLE = torch.device("cpu"), Share()
_PRELOADED = ["moeplan.runtime_min.offload", "torch.distributed", "numba"]  # once for all ranks
_LEFT, _REFUSED = 3, 2  # exit codes: another rank was lost; the rank cannot run, and has said why
_MEMORY = "if the system ended it for want of memory, its log says so"
_GRACE_S = 5.0  # in which rank 0 notices by itself that another rank is lost


class RankError(RunError):
    """Another rank is lost."""


class Ranks:
    """One rank's way to the others. Alone it sums and tells nothing."""

    def __init__(
        self,
        share: Share = _WHOLE,
        device: torch.device = _CPU,
        meeting: Path | None = None,
        others: Sequence[BaseProcess] = (),
    ) -> None:
        self.share, self.device, self._others = share, device, others
        self.reports: list[RankReport] = []  # of each rank, once a run is complete
        self._refusal = meeting / "refusal" if meeting else Path()
        if meeting:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            kinds = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{_backend(device)}"
            # A file, so that no port is open to other machines.
            store = dist.FileStore(str(meeting / "ranks"), share.ranks)  # type: ignore[attr-defined]
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
                yield Generation(told[0], told[1], Sampling(0.0, 1.0, 0))

    def agree(self, generations: Sequence[Generation]) -> None:
        """Let `generations` end as rank 0's, which have taken a token each, or ended without."""
        if self.count == 1:
            return
        told = self._tell([(g.tokens[-1:], g.finish) for g in generations] if self.leads else None)
        for generation, (last, finish) in zip(generations, told, strict=True):
            if not self.leads:
                generation.finish = finish
                generation.tokens += last if finish != "invalid" else []

    def gather(self, report: RankReport) -> None:
        """Keep those of all ranks in `reports`, each before more is asked of it."""
        self.reports = [report] * self.count
        if self.count > 1:
            with self._together():
                dist.all_gather_object(self.reports, report)

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
            end = time.monotonic() + _GRACE_S
            while self._others and time.monotonic() < end:
                if loss := _loss(self._others, self._refusal):
                    raise loss from None
                time.sleep(0.01)
            raise RankError(f"a rank cannot be reached: {str(error).splitlines()[0]}") from None


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
        others: list[BaseProcess] = []
        ended = threading.Event()
        try:
            for rank in range(1, count):
                given = rank, folder, checkpoint, rehearse, Path(meeting)
                process = context.Process(target=_follow, args=given, name=f"rank {rank}", daemon=True)
                process.start()
                others.append(process)
            watched = others, Path(meeting, "refusal"), ended
            threading.Thread(target=_watch, args=watched, daemon=True).start()
            yield Ranks(Share(0, count), device_of(0, rehearse), Path(meeting), others)
        finally:
            ended.set()
            for other in others:
                other.kill()
            for other in others:
                other.join()
            if dist.is_initialized():
                dist.destroy_process_group()


def _follow(rank: int, folder: Path, checkpoint: Path, rehearse: bool, meeting: Path) -> None:
    """The life of another rank: run what rank 0 runs, until that ends."""
    from moeplan.runtime_min.offload import Offload

    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all; rank 0 decides what follows
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_rank_0, daemon=True).start()
    code = 1
    try:
        plan, device = load(folder), device_of(rank, rehearse)
        ranks = Ranks(Share(rank, plan.offload.gpus), device, meeting)
        with Offload(folder, plan, checkpoint, device, ranks) as engine:
            while True:
                engine.run(())
    except RankError:
        code = _LEFT
    except RunError as error:
        code = _REFUSED
        Path(meeting, "refusal").write_text(f"{error}\0{error.hint}", encoding="utf-8")
    except BaseException:
        traceback.print_exc()
    os._exit(code)  # no thread of a lane holds it up


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


def _watch(others: Sequence[BaseProcess], refusal: Path, ended: threading.Event) -> None:
    """End rank 0 where it does not notice by itself that another is lost: some backends wait forever."""
    wait([process.sentinel for process in others])
    if not ended.wait(2 * _GRACE_S) and (loss := _loss(others, refusal)):
        print(f"{loss}\n  hint: {loss.hint}", file=sys.stderr, flush=True)
        os._exit(_REFUSED)


def _loss(others: Sequence[BaseProcess], refusal: Path) -> RankError | None:
    """Which of rank 0's others has ended first and why: not those that have missed another."""
    for process in others:
        code = process.exitcode
        if code is None or code == _LEFT:
            continue
        if code == _REFUSED and refusal.exists():
            return RankError(*refusal.read_text(encoding="utf-8").split("\0"))
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return RankError(f"{process.name} of {len(others) + 1} is lost: it {how}", _MEMORY)
    return None
