"""What a run did: its record, the same in lines of text, and as JSON beside what the plan expected."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeplan.runtime_min.errors import written
from moeplan.runtime_min.plan_file import Range, RuntimePlan

if TYPE_CHECKING:
    from moeplan.runtime_min.engine import Batches, Stats

REPORT_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FullBatches:
    """The fullest batches of a run, all of one number of `sequences`, and the sums over them. A batch goes on
    while requests take the places of others.

    `warm`: without the first batch of the run, which waits for caches and threads to come up.
    """

    sequences: int
    batches: int
    warm: bool
    sums: Stats

    def figures(self) -> dict[str, float]:
        """Measured rates and latencies, by the names that a profile has for them."""
        sums = self.sums
        figures = {
            "prefill_tokens_per_s": sums.prefilled_tokens / sums.prefill_s,
            "requests_per_s": sums.requests / sums.seconds,
            "ttft_s": sums.first_tokens_s / sums.requests,
        }
        if sums.decode_passes:
            figures["decode_tokens_per_s"] = sums.decode_tokens / sums.decode_s
            figures["itl_s"] = sums.decode_s / sums.decode_passes
        return figures


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneReport:
    """Seconds in which a lane worked, and in which it waited for others; bytes that it read."""

    name: str
    busy_s: float
    stall_s: float
    bytes_read: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """Bytes that a rank read of files while it loaded, and in passes; the most memory it has held."""

    loaded_bytes: int
    bytes_read: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a run did so far, loading not counted in `stats`.

    `requests` are those of the input; `resumed` of them were done by an earlier run. `lanes` are those that
    had work; the first computes. `rehearsed`: the CPU took the accelerator's place. Of several ranks times
    and lanes are those of rank 0, bytes the sums over `ranks`, which are empty until the run is complete.
    """

    requests: int
    answered: int
    failed: int
    resumed: int
    stats: Stats
    lanes: tuple[LaneReport, ...]
    bytes_read: int
    peak_bytes: int
    full: FullBatches | None
    rehearsed: bool
    ranks: tuple[RankReport, ...] = ()


@dataclass(slots=True)
class Counts:
    """Requests of a run, as they are dealt with."""

    requests: int
    answered: int = 0
    failed: int = 0
    resumed: int = 0

    @property
    def done(self) -> int:
        return self.answered + self.failed + self.resumed


def make_report(engine: Batches, counts: Counts, rehearse: bool) -> Report:
    """What `engine` has done; while it works a figure may lack the block under way."""
    ranks = engine.ranks.reports if engine.ranks.count > 1 else []
    lanes = tuple(
        LaneReport(name=name, busy_s=lane.busy_s, stall_s=lane.stall_s, bytes_read=lane.bytes_read)
        for name, lane in engine.lanes.lanes.items()
        if lane.done
    )
    return Report(
        **asdict(counts),
        stats=replace(engine.stats),
        lanes=lanes,
        bytes_read=sum(r.bytes_read for r in ranks) or engine.disk.bytes_read,
        peak_bytes=sum(r.peak_bytes for r in ranks) or peak_bytes(),
        full=_full_batches(engine.batches),
        rehearsed=rehearse and engine.plan.device == "accelerator",
        ranks=tuple(ranks),
    )


def _full_batches(batches: Sequence[tuple[int, Stats]]) -> FullBatches | None:
    """The batches with the most sequences, summed; the last one of a run is often smaller."""
    if not batches:
        return None
    most = max(sequences for sequences, _ in batches)
    warm = sum(sequences == most for sequences, _ in batches[1:]) > 0
    full = [stats for sequences, stats in batches[int(warm) :] if sequences == most]
    sums = functools.reduce(lambda all_before, stats: all_before.plus(stats), full)
    return FullBatches(sequences=most, batches=len(full), warm=warm, sums=sums)


def peak_bytes() -> int:
    """The most memory this process has held. Not getrusage: there a process inherits its parent's peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def summary(plan: RuntimePlan, report: Report) -> str:
    """The run in lines of text, its speeds beside those that the plan expects."""
    stats, whole = report.stats, report.stats.prompt_tokens + report.stats.shared_tokens
    shared = f"  shared     {stats.shared_tokens:,} of {whole:,} prompt tokens: others begin alike"
    # In a rehearsal the host's memory holds the device's too.
    planned = plan.memory.budget_bytes + plan.offload.budget_bytes * report.rehearsed
    resumed = f" ({report.resumed} from the interrupted run)" if report.resumed else ""
    failed = f", {report.failed} with an error record" if report.failed else ""
    lines = [
        f"{report.answered + report.failed + report.resumed} requests{resumed}{failed}; "
        f"{stats.generated_tokens:,} tokens generated in {stats.seconds:.1f} s",
        *(_speed(*speed) for speed in _speeds(plan, report)),
        *([shared] if stats.shared_tokens else ()),
        f"  memory     {_gib(report.peak_bytes)} GiB at peak, planned {_gib(planned)}",
        *(_lane(lane, stats.seconds) for lane in report.lanes if stats.seconds > 0),
    ]
    if report.ranks:
        loaded = ", ".join(_gib(rank.loaded_bytes) for rank in report.ranks)
        lines.append(
            f"  ranks      {len(report.ranks)}, which loaded {loaded} GiB; lanes are those of rank 0"
        )
    expected = plan.predicted.generated_tokens_per_s
    if report.rehearsed:
        lines.append("  rehearsal: the CPU took the accelerator's place, so no speed above is the plan's")
    elif stats.seconds > 0 and stats.generated_tokens / stats.seconds < expected.low:
        lines.append(f"  slower than planned: {_SLOWER}")
    return "\n".join(lines)


_SLOWER = "a busy machine, a batch that was not full, or a model so small that calls outweigh arithmetic"


def _speeds(plan: RuntimePlan, report: Report) -> Iterator[tuple[str, float, Range]]:
    """(phase, tokens/s as measured, tokens/s as planned) of each phase that ran."""
    expected, stats = plan.predicted, report.stats
    phases = (
        ("prefill", stats.prefilled_tokens, stats.prefill_s, expected.prefill_tokens_per_s),
        ("decode", stats.decode_tokens, stats.decode_s, expected.decode_tokens_per_s),
        ("generated", stats.generated_tokens, stats.seconds, expected.generated_tokens_per_s),
    )
    return ((name, tokens / seconds, planned) for name, tokens, seconds, planned in phases if seconds > 0)


def _speed(name: str, measured: float, plan: Range) -> str:
    interval = f"{plan.low:,.0f} to {plan.high:,.0f}"
    return f"  {name:9}  {measured:,.0f} tokens/s, the plan expected {plan.value:,.0f} ({interval})"


def _lane(lane: LaneReport, elapsed_s: float) -> str:
    text = f"  {lane.name:9}  busy {lane.busy_s / elapsed_s:4.0%}, waited {lane.stall_s / elapsed_s:4.0%}"
    if not lane.bytes_read:
        return text
    rate = lane.bytes_read / lane.busy_s / 1e9
    return f"{text}, {_gib(lane.bytes_read)} GiB read at {rate:.2f} GB/s while busy"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def write_report(path: Path, runtime_dir: Path, plan: RuntimePlan, report: Report) -> None:
    """Write everything measured as JSON, beside what the plan expected; raises RunError.

    `moeplan calibrate --from` reads it, and finds the plan by `runtime_dir` and its runtime.json's digest.
    """
    record = asdict(report)
    data = {
        "format": REPORT_FORMAT,
        "plan": plan.name,
        "runtime_dir": str(runtime_dir.resolve()),
        "runtime_sha256": hashlib.sha256((runtime_dir / "runtime.json").read_bytes()).hexdigest(),
        "sequences": plan.batch.sequences,
        "measured": record.pop("stats") | record | {"elapsed_s": report.stats.seconds},
        "predicted_and_measured": [_compared(*speed) for speed in _speeds(plan, report)],
    }
    with written(path):
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _compared(name: str, measured: float, plan: Range) -> dict[str, Any]:
    return {
        "figure": f"{name}_tokens_per_s",
        "predicted": plan.value,
        "low": plan.low,
        "high": plan.high,
        "measured": measured,
        "ratio": measured / plan.value,
        "within": plan.low <= measured <= plan.high,
    }
