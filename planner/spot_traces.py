"""Spot traces: what zones could launch, from CSV (also gzipped), NPZ, or a folder of ping traces in JSON.

CSV: lines `# key: value`, a header `step,ZONE,...` or `time,ZONE,...`, then a row per step with the number of
machines that could be launched. Keys: `step_seconds` (needed with `step`), `start`, `instance`, `source`,
`encoding` (available or preempted). `time` is seconds or ISO 8601. NPZ: `capacity` [steps, zones], `zones`,
and the same keys. JSON: a file ZONE_GPU_COUNT.json per zone, as SkyPilot's spot-traces and SkyServe's
artifact have them: {"metadata": {"gap_seconds": S}, "data": [...]}.

A zone is a cloud's own name for it (us-east-1a, us-central1-b), or CLOUD/REGION/ZONE, or CLOUD/REGION.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import math
import re
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from moeplan.planner.diagnostics import CompileError, Diagnostic, Span
from moeplan.planner.ir.machine import Machine
from moeplan.planner.ir.spec import Cloud
from moeplan.planner.ir.spot import UNLIMITED, SpotTrace, ZoneName
from moeplan.planner.suggest import nearest

_MOST_PROBLEMS = 5
_MOST_STEPS, _MOST_ZONES = 2_000_000, 500
_STEP_LIMITS_S = (1.0, 86400.0)
_JITTER = 0.25  # of a step, that clocks of probes may wander
_ENCODINGS = ("available", "preempted")
_INVERTED = re.compile(r"1\s*=\s*(preempt|interrupt|unavailable|down)", re.IGNORECASE)
_AWS_ZONE = re.compile(r"([a-z]{2}(?:-[a-z]+)+-\d+)[a-z]")
_GCP_ZONE = re.compile(r"([a-z]+(?:-[a-z]+)+\d+)-[a-z]")

Region = tuple[Cloud, str]


@dataclass(slots=True)
class _Raw:
    """A file as read: cells may be missing (NaN). `lines` are the places of rows, `clock_s` their times."""

    path: Path
    keys: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    values: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    lines: Sequence[int] = ()
    clock_s: list[float] = field(default_factory=list)
    header_line: int = 1
    steps_counted: bool = True  # the clock counts steps, not seconds
    notes: list[str] = field(default_factory=list)
    problems: list[Diagnostic] = field(default_factory=list)

    def wrong(self, what: str, hint: str = "", line: int = 0, column: int = 1) -> None:
        span = Span(str(self.path), line, column if line else 0)
        self.problems.append(Diagnostic(code="bad-spot-trace", span=span, message=what, hint=hint))

    def line(self, row: int) -> int:
        return self.lines[row] if row < len(self.lines) else 0


def read_spot_trace(path: Path, span: Span, regions: Collection[Region]) -> SpotTrace:
    """The trace of a file or folder that the spec names at `span`; `regions` are those the catalog knows.

    Raises CompileError naming gaps, clock jumps, mixed steps, inverted encodings and unknown zones.
    """
    raw = _read(path, span)
    zones = _zones(raw, regions)
    step_s = _step(raw)
    values = _values(raw)
    if raw.problems:
        shown = raw.problems[:_MOST_PROBLEMS]
        more = len(raw.problems) - len(shown)
        note = Diagnostic(code="bad-spot-trace", span=span, message=f"{path}: {more} more problems")
        raise CompileError(*shown, *([note] if more else []))
    counted = bool((values > 1).any())
    return SpotTrace(
        zones=zones,
        step_s=step_s,
        capacity=(values if counted else values * UNLIMITED).astype(np.int16),
        counted=counted,
        start=_told(raw, "start"),
        instance=_told(raw, "instance"),
        source=_told(raw, "source"),
        notes=tuple(raw.notes),
    )


def write_spot_trace(trace: SpotTrace) -> str:
    """The trace as CSV text in the format above."""
    out = io.StringIO()
    keys = {"step_seconds": f"{trace.step_s:g}", "encoding": "available"}
    told = {"start": trace.start, "instance": trace.instance, "source": trace.source}
    for key, value in {**keys, **{k: v for k, v in told.items() if v}}.items():
        out.write(f"# {key}: {value}\n")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("step", *map(str, trace.zones)))
    values = trace.capacity if trace.counted else np.minimum(trace.capacity, 1)
    writer.writerows((step, *row) for step, row in enumerate(values.tolist()))
    return out.getvalue()


def covers(trace: SpotTrace, machine: Machine) -> bool:
    """Whether the trace was taken with this machine or its GPU, or does not say with what."""
    words = set(re.findall(r"[A-Za-z0-9.+-]+", trace.instance))
    return not words or machine.name in words or machine.gpu in words


def _told(raw: _Raw, key: str) -> str:
    value = raw.keys.get(key, "")
    return "" if value.lower() == "unknown" else value


# Files to raw cells


def _read(path: Path, span: Span) -> _Raw:
    try:
        if path.is_dir():
            return _read_folder(path)
        if path.suffix == ".npz":
            return _read_npz(path)
        if path.suffix == ".json":
            return _read_pings(path, [path])
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return _read_csv(path, content.decode("utf-8-sig"))
    except (OSError, EOFError, ValueError, KeyError, TypeError, csv.Error, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or f"cannot be read: {type(error).__name__}: {error}"
        hint = "a CSV (also .gz) or NPZ as docs/placement.md has it, or a folder of ZONE_GPU_COUNT.json"
        message = f"spot trace {path}: {reason}"[:300]
        raise CompileError(
            Diagnostic(code="unreadable-file", span=span, message=message, hint=hint)
        ) from None


def _read_csv(path: Path, text: str) -> _Raw:
    raw = _Raw(path)
    lines = text.splitlines()
    first = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    for line in lines[:first]:
        key, _, value = line[1:].partition(":")
        raw.keys[key.strip().lower()] = value.strip()
    rows = csv.reader(lines[first:])
    header = [cell.strip() for cell in next(rows, [])]
    raw.header_line = first + 1
    if len(header) < 2 or header[0] not in ("step", "time", "timestamp"):
        raise ValueError(f"the header is {','.join(header)[:60]!r}, expected step,ZONE,... or time,ZONE,...")
    raw.names, raw.steps_counted = header[1:], header[0] == "step"
    kept = [(first + rows.line_num, row) for row in rows if row]
    raw.lines = [line for line, _ in kept]
    _fill(raw, [row for _, row in kept])
    return raw


def _fill(raw: _Raw, rows: Sequence[Sequence[str]]) -> None:
    """Cells to numbers; a row of another length, and what is no number, is a problem."""
    if len(rows) > _MOST_STEPS or len(raw.names) > _MOST_ZONES:
        raise ValueError(f"more than {_MOST_STEPS:,} steps or {_MOST_ZONES} zones")
    width = len(raw.names)
    raw.values = np.full((len(rows), width), np.nan)
    for n, row in enumerate(rows):
        raw.clock_s.append(_moment(raw, row[0], n))
        if len(row) != width + 1:
            hint = "zones of unequal length are cut to the shortest; an empty cell is a gap"
            raw.wrong(f"{len(row) - 1} values, expected {width}", hint, raw.line(n))
            continue
        for z, cell in enumerate(row[1:]):
            if cell.strip():
                raw.values[n, z] = _number(raw, cell, n, row, z)


def _number(raw: _Raw, cell: str, n: int, row: Sequence[str], z: int) -> float:
    try:
        return float(cell)
    except ValueError:
        column = 1 + sum(len(before) + 1 for before in row[: z + 1])
        raw.wrong(f"{cell[:40]!r} is no number of machines", "", raw.line(n), column)
        return 0.0


def _moment(raw: _Raw, cell: str, n: int) -> float:
    try:
        return float(cell)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(cell.strip())
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except ValueError:
        raw.wrong(f"{cell[:40]!r} is no step or time", "a number, or ISO 8601", raw.line(n))
        return math.nan


def _read_npz(path: Path) -> _Raw:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        keys = {name: str(arrays[name]) for name in arrays.files if arrays[name].ndim == 0}
        values = np.asarray(arrays["capacity"], dtype=np.float64)
        names = [str(name) for name in arrays["zones"]]
        clock = arrays["time"].tolist() if "time" in arrays.files else list(range(len(values)))
    if values.ndim != 2 or values.shape[1] != len(names) or len(clock) != len(values):
        raise ValueError(f"capacity has shape {values.shape}, expected [steps, {len(names)} zones]")
    if len(values) > _MOST_STEPS or len(names) > _MOST_ZONES:
        raise ValueError(f"more than {_MOST_STEPS:,} steps or {_MOST_ZONES} zones")
    return _Raw(
        path,
        keys=keys,
        names=names,
        values=values,
        clock_s=[float(moment) for moment in clock],
        steps_counted="time" not in arrays.files,
    )


def _read_folder(path: Path) -> _Raw:
    files = sorted(path.glob("*.json"))
    if not files:
        raise ValueError("no ZONE_GPU_COUNT.json in this folder")
    return _read_pings(path, files)


def _read_pings(path: Path, files: Sequence[Path]) -> _Raw:
    """One file per zone. All began together; longer ones are cut to the shortest, which is noted."""
    raw = _Raw(path)
    columns, gaps = [], {}
    for file in files:
        held = json.loads(file.read_bytes())
        gaps[file.name] = float(held["metadata"]["gap_seconds"])
        raw.keys.update({k: str(v) for k, v in held["metadata"].items() if k != "gap_seconds"})
        columns.append(np.array([math.nan if v is None else float(v) for v in held["data"]]))
        raw.names.append(file.stem.split("_")[0])
    if len(set(gaps.values())) > 1:
        told = ", ".join(f"{name} {gap:g} s" for name, gap in sorted(gaps.items()))
        raw.wrong(f"mixed steps: {told}"[:300], "bring all zones to one step before")
    steps = min(len(column) for column in columns)
    if any(len(column) > steps for column in columns):
        raw.notes.append(f"zones of unequal length were cut to the shortest, {steps} steps")
    raw.keys["step_seconds"] = f"{next(iter(gaps.values())):g}"
    raw.values = np.stack([column[:steps] for column in columns], axis=1)
    raw.clock_s = [float(n) for n in range(steps)]
    return raw


# Raw cells to a trace


def _zones(raw: _Raw, regions: Collection[Region]) -> tuple[ZoneName, ...]:
    known = {f"{cloud}/{region}" for cloud, region in regions}
    found = [_zone(name) for name in raw.names]
    for n, (name, zone) in enumerate(zip(raw.names, found, strict=True)):
        column = 1 + len("step,") + sum(len(before) + 1 for before in raw.names[:n])
        line = raw.header_line if raw.lines else 0
        if zone is None or (zone.cloud, zone.region) not in regions:
            place = f"{zone.cloud}/{zone.region}" if zone else name
            hint = nearest(place, known, "name it CLOUD/REGION/ZONE; `moeplan catalog offers` lists regions")
            raw.wrong(f"unknown zone {name[:60]!r}", hint, line, column)
        elif zone in found[:n]:
            raw.wrong(f"zone {name[:60]!r} comes twice", "keep one column per zone", line, column)
    return tuple(zone for zone in found if zone is not None)


def _zone(name: str) -> ZoneName | None:
    clouds: dict[str, Cloud] = {"aws": "aws", "gcp": "gcp", "azure": "azure"}
    parts = name.split("/")
    if parts[0] in clouds:
        cloud, rest = clouds[parts[0]], parts[1:]
        if len(rest) == 2:
            return ZoneName(cloud=cloud, region=rest[0], zone=rest[1])
        within = _zone(rest[0]) if len(rest) == 1 else None
        if within and within.cloud == cloud:
            return within
        return ZoneName(cloud=cloud, region=rest[0]) if len(rest) == 1 else None
    if match := _AWS_ZONE.fullmatch(name):
        return ZoneName(cloud="aws", region=match[1], zone=name)
    if match := _GCP_ZONE.fullmatch(name):
        return ZoneName(cloud="gcp", region=match[1], zone=name)
    return None


def _step(raw: _Raw) -> float:
    """Seconds of a step, from the header or the rows' own times; NaN after a problem."""
    if len(raw.values) < 2:
        raw.wrong("fewer than two steps")
        return math.nan
    told = _seconds(raw)
    clock = [moment for moment in raw.clock_s if math.isfinite(moment)]
    steps = [b - a for a, b in itertools.pairwise(clock)]
    forward = [step for step in steps if step > 0]
    if not forward:
        raw.wrong("the clock stands still", "one row per step, times ascending", raw.line(1))
        return math.nan
    usual = 1.0 if raw.steps_counted else median(forward)
    _check_clock(raw, steps, usual)
    if raw.steps_counted and told is None:
        raw.wrong("no step_seconds", "add a line `# step_seconds: 300` before the header")
        return math.nan
    if not raw.steps_counted and told is not None and abs(told - usual) > _JITTER * usual:
        hint = f"correct step_seconds to {usual:g}, or the times"
        raw.wrong(f"mixed steps: step_seconds is {told:g}, rows are {usual:g} s apart", hint)
    step_s = told if told is not None else usual
    if not _STEP_LIMITS_S[0] <= step_s <= _STEP_LIMITS_S[1]:
        raw.wrong(f"a step of {step_s:g} s", "steps last from 1 s to 1 d")
    return step_s


def _seconds(raw: _Raw) -> float | None:
    text = raw.keys.get("step_seconds", "")
    try:
        seconds = float(text) if text else None
    except ValueError:
        seconds = math.nan
    if seconds is not None and not math.isfinite(seconds):
        raw.wrong(f"step_seconds is {text[:40]!r}", "a number of seconds")
        return None
    return seconds


def _check_clock(raw: _Raw, steps: Sequence[float], usual: float) -> None:
    """Every row follows the one before by one step: else the clock jumped, rows are missing, or steps
    differ."""
    odd = {n for n, step in enumerate(steps) if step > 0 and abs(step - usual) > _JITTER * usual}
    if len(odd) > max(2, len(steps) // 10):
        told = ", ".join(f"{step:g} s" for step in sorted({steps[n] for n in odd} | {usual})[:4])
        raw.wrong(
            f"mixed steps: rows are {told} apart", "resample the trace to one step", raw.line(min(odd) + 1)
        )
        odd = set()
    unit = "" if raw.steps_counted else " s"
    for n, step in enumerate(steps):
        line = raw.line(n + 1)
        if step <= 0:
            what = f"the clock jumps from {raw.clock_s[n]:g} to {raw.clock_s[n + 1]:g}{unit}"
            raw.wrong(what, "sort the rows by time and keep one per step; use UTC", line)
        elif n in odd and step > usual:
            missing = round(step / usual) - 1
            hint = "fill the steps in (0 where nothing is known), or cut the trace there"
            raw.wrong(f"a gap: {missing} step{'s' * (missing > 1)} missing before this row", hint, line)
        elif n in odd:
            raw.wrong(f"this row comes {step:g}{unit} after the one before", "one row per step", line)


def _values(raw: _Raw) -> NDArray[np.float64]:
    """Whole numbers of machines, 0 = none; gaps, other values and inverted encodings are problems."""
    values = raw.values
    for z in np.flatnonzero(np.isnan(values).any(axis=0)):
        rows = np.flatnonzero(np.isnan(values[:, z]))
        what = f"a gap: {len(rows)} value{'s' * (len(rows) > 1)} of {raw.names[z]} missing, the first here"
        hint = "write 0 where nothing is known (the careful choice), or the value before"
        raw.wrong(what, hint, raw.line(int(rows[0])) or 0)
    filled = np.nan_to_num(values, nan=0.0)
    for n, z in np.argwhere((filled < 0) | (filled != np.floor(filled)) | (filled > UNLIMITED))[
        :_MOST_PROBLEMS
    ]:
        raw.wrong(
            f"{filled[n, z]:g} is no number of machines ({raw.names[z]})", "whole, 0 or more", raw.line(n)
        )
    return _available(raw, filled)


def _available(raw: _Raw, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values with 1 = available. Where a 0/1 trace does not say so and looks inverted, that is a problem."""
    encoding = raw.keys.get("encoding", "")
    if encoding and encoding not in _ENCODINGS:
        raw.wrong(f"encoding is {encoding[:40]!r}", f"one of {', '.join(_ENCODINGS)}")
    binary = bool((values <= 1).all())
    if encoding == "preempted" and not binary:
        raw.wrong("encoding is preempted, yet there are values above 1", "preempted traces hold 0 and 1 only")
    if encoding == "preempted":
        return 1.0 - values
    if not encoding and binary and values.size:
        share = float((values > 0).mean())
        says = _INVERTED.search(raw.keys.get("value", ""))
        if says or share < 0.5:
            why = f"says {says.group()!r}" if says else f"has a machine only {share:.0%} of the time"
            hint = "add `# encoding: preempted` if 1 means preempted, `# encoding: available` if it does not"
            raw.wrong(f"the encoding looks inverted: the trace {why}", hint)
    return values
