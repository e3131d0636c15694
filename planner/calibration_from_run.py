"""A run's report, the plan that it executed -> the figures of a machine on which that run is no surprise.

Only what the run can tell changes: how fast the cores are as a whole, and the disk while pages are streamed.
The other figures are those of the machine that the plan was made for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from moeplan.planner.diagnostics import CompileError, Diagnostic, Span

FORMAT = 1  # of the report
_LEAST_READ_BYTES = 64 << 20  # less says little about a disk
_LEAST_FULL = 0.5  # of the planned sequences: smaller batches cost more per token than planned

Figures = dict[str, Any]  # the machine file's keys, groups as mappings
_Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """The machine's figures, and a sentence that says where they come from."""

    figures: Figures
    source: str


def figures_from_run(path: Path) -> RunFigures:
    """Figures of the machine that executed the run of the report `path`; raises CompileError.

    `slower` is the run's seconds in passes, without those in which the cores waited, over the seconds that
    the plan has for as many tokens; every rate of the cores is divided by it. The disk's rate is bytes read
    over its busy seconds, brought back to an idle machine by the share that reading keeps beside products.
    """
    report = _load(path, "run report", FORMAT)
    measured, policy = report["measured"], _policy(path, report)
    if policy["gpus"] or measured["rehearsed"]:
        _refuse(path, "the plan is for a GPU", "only runs on a machine without one change its figures")
    lanes = {lane["name"]: lane for lane in measured["lanes"]}
    sequences = measured["decode_tokens"] / max(1, measured["decode_passes"])
    if "compute" not in lanes or sequences < _LEAST_FULL * report["sequences"]:
        message = f"the batch was not full: {sequences:.0f} of {report['sequences']} sequences"
        _refuse(path, message, "give the run more requests, or use the report of `runtime_min bench`")
    working = 1 - lanes["compute"]["stall_s"] / measured["elapsed_s"]
    slower = working * (measured["prefill_s"] + measured["decode_s"]) / _cores_s(measured, policy)
    figures = _figures(policy["machine"], slower)
    source = f"The cores took {slower:.2f} times as long as predicted"
    disk = lanes.get("disk", {"bytes_read": 0})
    if disk["bytes_read"] >= _LEAST_READ_BYTES:
        kept = figures["disk"]["while_computing"]
        beside = 1 + (1 / kept - 1) * working
        figures["disk"]["bytes_per_s"] = disk["bytes_read"] / disk["busy_s"] * beside
        source += "; the disk's rate is that of streaming"
    origin = f"Measured by a run of {report['plan']}, starting from {policy['machine']['name']}."
    return RunFigures(figures=figures, source=f"{origin} {source}.")


def _cores_s(measured: _Json, policy: _Json) -> float:
    """Seconds that the plan has the cores work for the tokens of passes that are not mixed."""
    seconds = 0.0
    for phase, tokens in (("prefill", measured["prefilled_tokens"]), ("decode", measured["decode_tokens"])):
        lanes = {lane["lane"]: lane["seconds"] for lane in policy[phase]["lanes"]}
        share = lanes["cores"] / (max(lanes.values()) + policy[phase]["serial_s"])
        seconds += share * tokens / policy[f"{phase}_tokens_per_s"]["value"]
    return seconds


def _figures(machine: _Json, slower: float) -> Figures:
    """The figures that a machine file has, rates as reached, those of the cores for `slower` ones."""
    levels = {level["name"]: level for level in machine["levels"]}
    dram, disk = levels["dram"], levels["disk"]
    kernels: dict[str, dict[int, Figures]] = {}
    for entry in machine["kernels"]:
        by_threads = kernels.setdefault(entry["dtype"], {})
        by_threads[entry["threads"]] = {
            name: _scaled(name, value, slower)
            for name, value in entry.items()
            if name not in ("dtype", "threads")
        }
    peaks = dram["flops_per_s"].items()
    bandwidth = dram["bytes_per_s"] * dram["memory_efficiency"]
    return {
        "cpu": {
            "cores": machine["cpu_cores"],
            "flops_per_s": {dtype: rate * dram["compute_efficiency"] / slower for dtype, rate in peaks},
            "launch_s": machine["launch_s"] * slower,
            "while_reading": machine["compute_kept"],
            **({"kernels": kernels} if kernels else {}),
        },
        # Where operators were not measured, their speed is estimated from the memory's.
        "dram": {"bytes": dram["bytes"], "bytes_per_s": bandwidth if kernels else bandwidth / slower},
        "disk": {
            "bytes": disk["bytes"],
            "bytes_per_s": disk["bytes_per_s"] * disk["up_efficiency"],
            "while_computing": machine["disk_kept"],
            "sigma": machine.get("disk_sigma", 0.0),
        },
    }


def _scaled(name: str, value: Any, slower: float) -> Any:
    """A figure of `slower` cores: rates are lower, seconds longer."""
    factor = 1 / slower if name.endswith("_per_s") else slower
    return {row: rate * factor for row, rate in value} if isinstance(value, list) else value * factor


def _policy(path: Path, report: _Json) -> _Json:
    """The policy in plan.json of the replica that ran."""
    runtime_dir = Path(report["runtime_dir"])
    runtime = runtime_dir / "runtime.json"
    if not runtime.exists() or hashlib.sha256(runtime.read_bytes()).hexdigest() != report["runtime_sha256"]:
        _refuse(path, f"its plan is no longer in {runtime_dir}", "run the plan again, with --report")
    plan = _load(runtime_dir.parents[1] / "plan.json", "plan", None)
    return next(r["policy"] for r in plan["replicas"] if r["name"] == runtime_dir.name)


def _load(path: Path, what: str, format: int | None) -> _Json:
    try:
        data = json.loads(path.read_bytes())
    except ValueError:
        data = None
    if not isinstance(data, dict) or (format is not None and data.get("format") != format):
        _refuse(path, f"is no {what} of this version", "`moeplan run ... --report FILE` writes a run report")
    return data


def _refuse(path: Path, message: str, hint: str) -> NoReturn:
    raise CompileError(Diagnostic(code="run-report", span=Span(str(path)), message=message, hint=hint))
