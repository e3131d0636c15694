"""Why this GPU, this market, these limits: the same spec with the choice forced or the limit taken away."""

from __future__ import annotations

from collections.abc import Iterator

from moeplan.planner.explain.study import Study
from moeplan.planner.ir.explanation import Option, Question


def questions(study: Study) -> tuple[Question, ...]:
    """What could have been chosen instead, solved one by one; nothing for a machine that the spec pins."""
    if study.base.inputs.machine is not None:
        return ()
    return tuple(question for question in (_gpus(study), _purchase(study)) if len(question.options) > 1)


def _gpus(study: Study) -> Question:
    """Each GPU type of the market alone."""
    market, catalog = study.base.spec.market, study.base.inputs.catalog
    offered = {catalog.machines[offer.machine].gpu for offer in catalog.offers}
    names = [gpu for gpu in sorted(offered) if gpu and (not market.gpus or gpu in market.gpus)]
    used = {choice.column.policy.machine.gpu for choice in study.fleet.choices}
    options = [_forced(study, gpu, f"market.gpus=[{gpu}]", used == {gpu}) for gpu in names]
    return Question(text="why this GPU", options=_by_cost(options))


def _purchase(study: Study) -> Question:
    """Spot and on-demand, each alone."""
    wanted = study.base.spec.market.purchase
    kinds = ("spot", "on-demand") if wanted == "any" else (wanted,)
    used = {choice.column.market for choice in study.fleet.choices}
    options = [_forced(study, kind, f"market.purchase={kind}", used == {kind}) for kind in kinds]
    return Question(text="why this market", options=_by_cost(options))


def _forced(study: Study, name: str, setting: str, chosen: bool) -> Option:
    return Option(name=name, setting=setting, outcome=study.outcome(setting), chosen=chosen)


def _by_cost(options: list[Option]) -> tuple[Option, ...]:
    """The cheapest first, the refused last."""
    return tuple(
        sorted(
            options, key=lambda o: (bool(o.outcome.refusal), o.outcome.usd or o.outcome.usd_per_hour, o.name)
        )
    )


def limits(study: Study) -> Question:
    """Every limit of the spec taken away, and every promise made half as strict."""
    options = [
        Option(name=name, setting=setting, outcome=study.outcome(setting), chosen=False)
        for name, setting in _limits(study)
    ]
    return Question(text="what binds", options=tuple(options))


def _limits(study: Study) -> Iterator[tuple[str, str]]:
    """(name, setting that relaxes it) of the limits that the spec sets."""
    spans = study.base.spec.spans
    for key, name in (
        ("market.quota", "without the quota"),
        ("market.budget", "without the budget"),
        ("market.gpus", "any GPU"),
        ("market.regions", "any region"),
        ("market.clouds", "any cloud"),
        ("machine.memory", "without the memory limit"),
    ):
        if key in spans:
            yield name, f"{key}="
    for key, name in (
        ("workload.online.slo.ttft", "twice the TTFT"),
        ("workload.online.slo.itl", "twice the ITL"),
        ("workload.batch.deadline", "twice the deadline"),
    ):
        if key in spans:
            yield name, f"{key}=+100%"
