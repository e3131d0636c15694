"""A GPU or machine that was not chosen -> the settings that force it."""

from __future__ import annotations

from moeplan.planner.diagnostics import CompileError, Diagnostic, InfeasibleError, Span
from moeplan.planner.explain.case import Source
from moeplan.planner.explain.study import Study
from moeplan.planner.suggest import nearest


def forcing(study: Study, name: str) -> tuple[str, ...]:
    """Settings with which the spec can only be compiled for `name`, a GPU type or a machine of the catalog.

    On a market they restrict it. A spec that pins its machine gets the named one instead, or of the machines
    with the named GPU, as many as now where that exists, the one that generates most tokens per second.
    Raises CompileError for other names.
    """
    machines = study.base.inputs.catalog.machines
    gpus = {machine.gpu for machine in machines.values() if machine.gpu}
    if name not in gpus and name not in machines:
        hint = nearest(name, {*gpus, *machines}, "`moeplan catalog gpus` and `machines` list them")
        span = Span(f"--why-not '{name}'")
        message = f"no GPU or machine named {name!r} in the catalog"
        raise CompileError(Diagnostic(code="unknown-machine", span=span, message=message, hint=hint))
    if study.base.inputs.machine is None:
        return _on_the_market(study, name, name in gpus)
    if name in machines:
        return (f"machine={name}",)
    like = [m for m in machines.values() if m.gpu == name]
    alike = [m for m in like if m.gpus == study.base.inputs.machine.gpus]
    return _best(study, [m.name for m in alike or like])


def forced(study: Study, name: str) -> Study:
    """The study of the same spec with `name` forced."""
    settings = (*study.settings, *forcing(study, name))
    return Study(_anywhere(study.source), settings, study.progress)


def _on_the_market(study: Study, name: str, is_gpu: bool) -> tuple[str, ...]:
    """`name` alone on the market, and whatever else restricts its machines gone."""
    restricted, other = ("gpus", "machines") if is_gpu else ("machines", "gpus")
    gone = [f"market.{other}="] if f"market.{other}" in study.base.spec.spans else []
    return (f"market.{restricted}=[{name}]", *gone)


def _best(study: Study, machines: list[str]) -> tuple[str, ...]:
    """The machine that generates most; the first where none can do the work."""
    source = _anywhere(study.source)
    tried: list[tuple[str, ...]] = [(f"machine={name}",) for name in sorted(machines)]
    rates: dict[tuple[str, ...], float] = {}
    for setting in tried:
        answer = Study(source, (*study.settings, *setting), study.progress).decided()
        if not isinstance(answer, InfeasibleError):
            rates[setting] = sum(c.column.policy.generated_tokens_per_s.value for c in answer.choices)
    return max(rates, key=lambda setting: rates[setting]) if rates else tried[0]


def _anywhere(source: Source) -> Source:
    """The spec without a machine file in its place."""
    return Source(source.text, source.path)
