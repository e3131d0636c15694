"""Plan -> runtime/<replica>/schedule.svg: the pipeline around the boundary between two decode passes."""

from __future__ import annotations

from moeplan.codegen.gantt import Bar, gantt_svg
from moeplan.planner.ir.plan import Plan
from moeplan.planner.ir.schedule import Pipeline


def emit(plan: Plan) -> dict[str, str]:
    """Return a chart for each of our replicas."""
    return {
        chart_path(replica.name): chart(replica.pipeline) for replica in plan.replicas if replica.pipeline
    }


def chart_path(replica: str) -> str:
    """Where the chart of `replica` lies under the plan folder."""
    return f"runtime/{replica}/schedule.svg"


def chart(pipeline: Pipeline) -> str:
    """The pipeline's window as SVG text."""
    lanes = list(dict.fromkeys(lane.lane for lane in pipeline.busy if lane.seconds))
    bars = [
        Bar(
            lane=lanes.index(task.lane),
            op=task.op,
            start_s=task.start_s,
            end_s=task.end_s,
            label=f"layer {task.layer}, {task.item}",
        )
        for task in pipeline.window
        if task.lane in lanes
    ]
    title = f"{pipeline.schedule.name}, simulated: the end of one decode pass and the beginning of the next"
    return gantt_svg(title, lanes, bars)
