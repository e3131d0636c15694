"""What a run has done so far, for Prometheus: the text file that node_exporter's textfile collector reads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

from moeplan.runtime_min.errors import written
from moeplan.runtime_min.plan_file import RuntimePlan
from moeplan.runtime_min.report import Report

INTERVAL_S = 5.0


class MetricsFile:
    """Keeps `path` current while used as a context manager, and complete at its end.

    It is replaced whole every `INTERVAL_S`. Raises RunError where it cannot be written at the start; a disk
    that fills up later leaves the file as it was and the run alone.
    """

    def __init__(self, path: Path, plan: RuntimePlan, state: Callable[[], Report]) -> None:
        self._path, self._plan, self._state = path, plan, state
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Self:
        with written(self._path):
            self._write()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            self._write()

    def _keep(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            with suppress(OSError):
                self._write()

    def _write(self) -> None:
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text(metrics_text(self._plan, self._state()), encoding="utf-8")
        os.replace(temporary, self._path)


def metrics_text(plan: RuntimePlan, report: Report) -> str:
    """The report in Prometheus' text format, every sample labelled with the plan's name."""
    busy = {lane.name: lane.busy_s for lane in report.lanes}
    stalls = {lane.name: lane.stall_s for lane in report.lanes}
    speed = plan.predicted.generated_tokens_per_s.value
    metrics: tuple[tuple[str, str, float | dict[str, float]], ...] = (
        ("requests", "Requests of the input.", report.requests),
        ("requests_answered_total", "Requests answered.", report.answered),
        ("requests_failed_total", "Requests with an error record.", report.failed),
        ("requests_resumed", "Requests that an earlier run had done.", report.resumed),
        ("prompt_tokens_total", "Prompt tokens read.", report.stats.prompt_tokens),
        ("generated_tokens_total", "Tokens generated.", report.stats.generated_tokens),
        ("read_bytes_total", "Bytes of pages read.", report.bytes_read),
        ("lane_busy_seconds_total", "Seconds in which a lane worked.", busy),
        ("lane_stall_seconds_total", "Seconds in which a lane waited for others.", stalls),
        ("peak_bytes", "The most memory that the process held.", report.peak_bytes),
        ("planned_bytes", "Memory that the plan allows on the host.", plan.memory.budget_bytes),
        ("planned_tokens_per_second", "Generated tokens per second as planned.", speed),
    )
    return "".join(line for metric in metrics for line in _lines(plan.name, *metric))


def _lines(plan: str, name: str, help: str, values: float | dict[str, float]) -> Iterator[str]:
    """One metric; `values` is its value, or one for each lane."""
    kind = "counter" if name.endswith("_total") else "gauge"
    yield f"# HELP moeplan_{name} {help}\n# TYPE moeplan_{name} {kind}\n"
    for lane, value in values.items() if isinstance(values, dict) else [("", values)]:
        labels = f'plan="{_escaped(plan)}"' + (f',lane="{lane}"' if lane else "")
        yield f"moeplan_{name}{{{labels}}} {value}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
