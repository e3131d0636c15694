"""A plan folder, a request trace -> what a simulation says of the plan, without compiling it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moeplan.planner.diagnostics import CompileError, Diagnostic, Span
from moeplan.planner.ir.attainment import Percentiles, Pool, Replay, ServingLaw
from moeplan.planner.ir.fleet import Route
from moeplan.planner.ir.spec import Slo
from moeplan.planner.ir.workload import Bucket
from moeplan.planner.traces import RequestTrace, read_trace
from moeplan.planner.units import PER_SECOND, format_duration, parse


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The online part of a plan, as plan.json has it."""

    name: str
    slo: Slo
    rate_per_s: float
    buckets: tuple[Bucket, ...]
    routes: tuple[Route, ...]
    pools: tuple[Pool, ...]


def replay_requests(folder: Path, trace_file: Path, rate: str = "") -> str:
    """Serve the trace on the plan in `folder`, at its own rate or another ("8/s"), and in a surge
    of the plan's margin; the answer is text for a screen.

    Raises CompileError where the folder holds no plan of online work, the trace cannot be read, or the rate
    is none.
    """
    from moeplan.planner.simulate.fleet import replay, split  # take Numba

    service = read_service(folder)
    trace = read_trace(trace_file, Span(str(trace_file)))
    stream = trace.at_rate(_rate_per_s(rate)) if rate else trace
    parts = split(stream, service.buckets, service.routes, service.pools)
    planned, surge = (replay(parts, service.pools, service.slo, more) for more in (False, True))
    return "\n".join(_lines(service, stream, planned, surge))


def _rate_per_s(text: str) -> float:
    value = parse(text, PER_SECOND)
    if not value:
        hint = "for example 8/s, 500/min or 3600/h"
        message = f"{text!r} is not a rate"
        raise CompileError(Diagnostic(code="bad-rate", span=Span("--rate"), message=message, hint=hint))
    return float(value)


def read_service(folder: Path) -> Service:
    """What `folder`'s plan.json says of its online class. Raises CompileError."""
    path = folder / "plan.json"
    try:
        plan = json.loads(path.read_bytes())
        requests = next((c for c in plan["workload"]["classes"] if c["slo"]), None)
        if requests is None:
            raise _refusal(path, "the plan has no online work to simulate", "")
        return Service(
            name=plan["spec"]["name"],
            slo=Slo(**requests["slo"]),
            rate_per_s=requests["rate_per_s"],
            buckets=tuple(Bucket(**bucket) for bucket in requests["buckets"]),
            routes=tuple(Route(**r) for r in plan["fleet"]["routes"] if r["serves"] == requests["name"]),
            pools=tuple(_pool(pool) for pool in plan["attainment"]["pools"]),
        )
    except OSError as error:
        raise _refusal(
            folder, f"no plan folder: {path.name}: {error.strerror}", "`moeplan compile`"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        hint = "compile it again: it is of another version, or was changed"
        raise _refusal(path, "not a plan with what a simulation needs", hint) from None


def _pool(data: Mapping[str, Any]) -> Pool:
    law: dict[str, Any] = {f.name: data["law"][f.name] for f in fields(ServingLaw)}
    tables = {name: tuple(value) for name, value in law.items() if isinstance(value, list)}
    tables["step_s"] = tuple(map(tuple, law["step_s"]))
    return Pool(**{**data, "law": ServingLaw(**{**law, **tables})})


def _refusal(path: Path, message: str, hint: str) -> CompileError:
    return CompileError(Diagnostic(code="no-simulation", span=Span(str(path)), message=message, hint=hint))


def _lines(service: Service, stream: RequestTrace, planned: Replay, surge: Replay) -> list[str]:
    slo = service.slo
    lines = [
        f"{service.name}: {stream.requests:,} requests at {stream.rate_per_s:.4g}/s (planned for "
        f"{service.rate_per_s:.4g}/s), CV of gaps {stream.arrival_cv:.3g}",
        f"  promised    TTFT {format_duration(slo.ttft_s)}, ITL {format_duration(slo.itl_s)} for "
        f"{slo.attainment * 100:.5g} % of them",
    ]
    if note := stream.unread_note():
        lines.append(f"  not read    {note}")
    more = f"{max((pool.margin for pool in service.pools), default=1.0) - 1:.0%} faster"
    for title, found in (("at this rate", planned), (more, surge)):
        lines += _replay_lines(title, found)
    lines.append("  simulated: nothing was measured")
    return lines


def _replay_lines(title: str, found: Replay) -> list[str]:
    refused = f", {found.refused:,} of them refused as too long" if found.refused else ""
    lines = [f"  {title}: attained by {found.attained_share:.2%}{refused}"]
    lines += [
        f"    {name:<10}{percentiles_text(of)}"
        for name, of in (("TTFT", found.ttft), ("ITL", found.itl), ("worst gap", found.gap))
    ]
    return lines + [
        f"    {pool.column}: {pool.requests:,} requests, attained by {pool.attained_share:.2%}, engines busy "
        f"{pool.busy:.0%} of the time, {pool.occupied:.0%} full"
        for pool in found.pools
    ]


def percentiles_text(of: Percentiles) -> str:
    """P50, P90 and P99 with their units."""
    named = (("P50", of.p50_s), ("P90", of.p90_s), ("P99", of.p99_s))
    return ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in named)
