"""Two plan.json -> what differs in meaning: work, cost, fleet, routing, policies, placement, predictions.

A plan becomes facts, each a part, a name and a value; two plans differ where their facts do. Replicas are
paired by name, and those left over by the work they serve, so that another machine is one changed line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan.codegen.emit.plan_json import PLAN_FORMAT
from moeplan.planner.units import format_bytes, format_duration, format_figure

_PLAN = "plan.json"
_MANY_TIMES = 3.0  # from here on a factor reads better than a percentage
Plan = Mapping[str, Any]  # the data of a plan.json


class PlanFileError(Exception):
    """A plan.json that is not there or cannot be read; the message says where, what, and what next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One thing that a plan says. `number` is the value in base units, None where it is text."""

    text: str
    number: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A fact that differs; None where a plan has no such fact."""

    part: str
    what: str
    before: Fact | None
    after: Fact | None

    @property
    def ratio(self) -> float | None:
        """After over before, where both are numbers and the first is not 0."""
        if not self.before or not self.after or not self.before.number or self.after.number is None:
            return None
        return self.after.number / self.before.number


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """All changes of meaning, and in which parts of plan.json any value at all differs."""

    names: tuple[str, str]
    changes: tuple[Change, ...]
    sections: tuple[str, ...]


def read_plan(path: Path) -> Plan:
    """The data of a plan.json, given as the file or its folder. Raises PlanFileError."""
    file = path / _PLAN if path.is_dir() else path
    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        hint = "give a plan folder, or a plan.json"
        raise PlanFileError(f"{file}: {error.strerror or error}\n  hint: {hint}") from None
    except ValueError as error:
        hint = "compile it again" if file.name == _PLAN else "give a plan folder, or a plan.json"
        raise PlanFileError(f"{file}: not a plan: {error}\n  hint: {hint}") from None
    version = data.get("format") if isinstance(data, dict) else None
    if version != PLAN_FORMAT:
        hint = "compile it again with this version"
        raise PlanFileError(f"{file}: format {version}, this version reads {PLAN_FORMAT}\n  hint: {hint}")
    return dict(data)


def compare(before: Plan, after: Plan) -> Difference:
    """Everything that differs from `before` to `after`. Raises PlanFileError where a fact is missing."""
    try:
        return _compare(before, after)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        hint = "compile both again with this version"
        raise PlanFileError(f"{_PLAN}: not as this version writes it: {error}\n  hint: {hint}") from None


def _compare(before: Plan, after: Plan) -> Difference:
    pairs = _pairs(before["fleet"]["choices"], after["fleet"]["choices"])
    labels = _labels(pairs)
    old_facts = _facts(before, {old: label for (old, _), label in zip(pairs, labels, strict=True)})
    new_facts = _facts(after, {new: label for (_, new), label in zip(pairs, labels, strict=True)})
    changes = tuple(
        Change(part=part, what=what, before=old_facts.get((part, what)), after=new_facts.get((part, what)))
        for part, what in _merged(list(old_facts), list(new_facts))
        if old_facts.get((part, what)) != new_facts.get((part, what))
    )
    sections = sorted(s for s in {*before, *after} if before.get(s) != after.get(s))
    return Difference(
        names=(before["spec"]["name"], after["spec"]["name"]), changes=changes, sections=tuple(sections)
    )


def _pairs(before: Sequence[Plan], after: Sequence[Plan]) -> list[tuple[str, str]]:
    """Columns of both fleets that stand for each other: of one name, else the next that serves the same."""
    old, new = ([choice["column"]["name"] for choice in choices] for choices in (before, after))
    pairs = [(name, name) for name in old if name in new]
    left = [name for name in new if name not in old]
    for name in old:
        like = next((other for other in left if _serves(other) == _serves(name)), None)
        if name not in new and like:
            left.remove(like)
            pairs.append((name, like))
    return pairs


def _labels(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """A name for each pair: the column's where it is one, else of what it serves."""
    names = [old if old == new else f"{_serves(old)} replica" for old, new in pairs]
    again = [names[:n].count(name) + 1 for n, name in enumerate(names)]
    return [f"{name} {count}" if count > 1 else name for name, count in zip(names, again, strict=True)]


def _serves(column: str) -> str:
    return column.partition("-")[0]


def _merged(old: Sequence[tuple[str, str]], new: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """All keys, part by part in the order of first mention."""
    keys = list(dict.fromkeys([*old, *new]))
    parts = list(dict.fromkeys(part for part, _ in keys))
    return sorted(keys, key=lambda key: parts.index(key[0]))


# Facts


def _facts(plan: Plan, labels: Mapping[str, str]) -> dict[tuple[str, str], Fact]:
    """Every fact of a plan; `labels` name the replicas that both plans have."""
    found: dict[tuple[str, str], Fact] = {}
    for part, facts in (("cost", _cost(plan)), ("work", _work(plan)), ("fleet", _fleet(plan, labels))):
        found |= {(part, what): fact for what, fact in facts}
    found |= {("routing", what): fact for what, fact in _routing(plan, labels)}
    for site in plan["placement"]["sites"]:
        name = labels.get(site["column"], site["column"])
        found |= {("placement", f"{name}: {what}"): fact for what, fact in _site(site)}
    found["placement", "statement"] = Fact(text=plan["placement"]["statement"])
    found |= {("prediction", what): fact for what, fact in _simulated(plan)}
    for replica in plan["replicas"]:
        name = labels.get(replica["name"], replica["name"])
        found |= {("policy", f"{name}: {what}"): fact for what, fact in _policy(replica)}
        found |= {("prediction", f"{name}: {what}"): fact for what, fact in _prediction(replica["policy"])}
    return found


def _cost(plan: Plan) -> Iterator[tuple[str, Fact]]:
    """What is minimised first: the bill of batch work alone, else what an hour costs."""
    fleet, bill = plan["fleet"], list(_bill(plan))
    if fleet["cost_unit"] == "USD":
        yield from bill
    yield "USD per hour", _usd(fleet["usd_per_hour"])
    for serves, price in fleet["usd_per_million_tokens"]:
        yield f"USD per million generated tokens, {serves}", _usd(price["value"], 3)
    if fleet["cost_unit"] != "USD":
        yield from bill


def _bill(plan: Plan) -> Iterator[tuple[str, Fact]]:
    batch = [choice for choice in plan["fleet"]["choices"] if choice["hours"]]
    if batch:
        yield "USD in all for the batch work", _usd(sum(choice["usd"] for choice in batch))
        yield "time for the batch work", _seconds(max(choice["hours"] for choice in batch) * 3600)


def _work(plan: Plan) -> Iterator[tuple[str, Fact]]:
    model = plan["workload"]["model"]
    yield "model", Fact(text=f"{model['name']}, {plan['workload']['dtype']}")
    for requests in plan["workload"]["classes"]:
        name = requests["name"]
        if name == "batch":
            yield "batch requests", Fact(text=f"{requests['requests']:,}", number=requests["requests"])
        else:
            rate = requests["rate_per_s"]
            yield "online rate", Fact(text=f"{format_figure(rate)}/s", number=rate)
        if requests["deadline_s"]:
            yield "deadline", _seconds(requests["deadline_s"])
        if slo := requests["slo"]:
            yield "SLO, TTFT", _seconds(slo["ttft_s"])
            yield "SLO, ITL", _seconds(slo["itl_s"])
            yield "SLO, attainment", _share(slo["attainment"])
        for number, bucket in enumerate(requests["buckets"]):
            size = f"{bucket['prompt_tokens']:.0f} + {bucket['output_tokens']:.0f}"
            text = f"{size} tokens, {bucket['share']:.4g} of all"
            yield f"{name} size {number + 1}", Fact(text=text)


def _fleet(plan: Plan, labels: Mapping[str, str]) -> Iterator[tuple[str, Fact]]:
    machines = {replica["name"]: replica["policy"]["machine"]["name"] for replica in plan["replicas"]}
    for choice in plan["fleet"]["choices"]:
        column = choice["column"]
        name = labels.get(column["name"], column["name"])
        machine = f"{machines[column['name']]}, {column['market']}"
        yield f"{name}: replicas", Fact(text=f"{choice['replicas']}", number=choice["replicas"])
        yield f"{name}: machine", Fact(text=machine)
        if column["usd_per_hour"]:
            yield f"{name}: USD per hour of one", _usd(column["usd_per_hour"], 4)
        yield f"{name}: load", _share(choice["utilisation"])


def _routing(plan: Plan, labels: Mapping[str, str]) -> Iterator[tuple[str, Fact]]:
    for route in plan["fleet"]["routes"]:
        column = labels.get(route["column"], route["column"])
        yield f"{route['serves']} size {route['bucket'] + 1} to {column}", _share(route["share"])


def _site(site: Plan) -> Iterator[tuple[str, Fact]]:
    zones = [_zone(zone) for zone in site["zones"]]
    yield "where", Fact(text=", ".join(zones) or "your own machine")
    for field, what in (
        ("spot_overprovision", "spot replicas to spare"),
        ("on_demand_base", "on-demand base"),
    ):
        yield what, Fact(text=str(site[field]), number=site[field])
    yield "on-demand fallback", Fact(text="yes" if site["on_demand_fallback"] else "no")
    if outlook := site.get("outlook"):  # where there is evidence of the zones
        yield "expected bill, USD per hour", _usd(outlook["usd_per_hour"])
        yield "enough replicas ready", _share(outlook["availability"]["value"])


def _zone(zone: Plan) -> str:
    return "/".join(part for part in (zone["cloud"], zone["region"], zone.get("zone", "")) if part)


_SHARES = {
    "attention_gpu_share": "attention on the GPU",
    "kv_gpu_share": "KV cache in GPU memory",
    "resident_share": "experts resident",
    "experts_cpu_share": "experts on the CPU",
    "experts_disk_share": "experts from disk",
}


def _policy(replica: Plan) -> Iterator[tuple[str, Fact]]:
    policy = replica["policy"]
    yield "engine", Fact(text={"vllm": "vLLM"}.get(policy["engine"], policy["engine"]))
    form = ", whole experts" if policy.get("expert_shares") == "whole" else ""
    yield "GPUs per copy × copies", Fact(text=f"{policy['gpus']}{form} × {policy['data_parallel']}")
    yield "sequences in flight", Fact(text=str(policy["sequences"]), number=policy["sequences"])
    yield "micro-batches", Fact(text=f"{policy['micro_batches']} of {policy['micro_batch']}")
    kept = "" if policy.get("kv_dtype", "same") == "same" else f", KV cache in {policy['kv_dtype']}"
    yield "computed in", Fact(text=f"{policy['dtype']}, weights as {policy['weights_dtype']}{kept}")
    yield "weights on", Fact(text=policy["weights_on"] + (", staged" if policy["staged"] else ""))
    for field, what in _SHARES.items():
        yield what, _share(policy[field])
    if replica["pipeline"]:
        yield "schedule", Fact(text=replica["pipeline"]["schedule"]["name"])
    for limit in policy["limits"]:
        used = sum(use["bytes"] for use in policy["memory"] if use["level"] == limit["level"])
        yield f"{limit['level']} memory used", Fact(text=format_bytes(used), number=used)


def _prediction(policy: Plan) -> Iterator[tuple[str, Fact]]:
    for field, what in (
        ("generated_tokens_per_s", "generated tokens/s"),
        ("prefill_tokens_per_s", "prefill tokens/s"),
        ("decode_tokens_per_s", "decode tokens/s"),
    ):
        rate = policy[field]
        interval = f" ({format_figure(rate['low'])} to {format_figure(rate['high'])})"
        text = f"{format_figure(rate['value'])}{interval if rate['high'] > rate['low'] else ''}"
        yield what, Fact(text=f"{text} [{rate['provenance']}]", number=rate["value"])
    if policy["serves"] == "online":
        yield "TTFT, slowest size", _seconds(max(rate["ttft_s"] for rate in policy["rates"]))
        yield "ITL, slowest size", _seconds(max(rate["itl_s"] for rate in policy["rates"]))
    bottleneck = policy["bottleneck"]
    yield "bottleneck", Fact(text=f"{bottleneck['lane']} in {bottleneck['phase']}")


def _simulated(plan: Plan) -> Iterator[tuple[str, Fact]]:
    """How many requests keep the SLO, where the plan was simulated with queues."""
    for found in plan.get("attainment", {}).get("classes", ()):
        yield f"{found['serves']}: SLO kept, simulated", _share(found["planned"]["attained_share"])
        yield f"{found['serves']}: P99 TTFT, simulated", _seconds(found["planned"]["ttft"]["p99_s"])


def _usd(value: float, digits: int = 2) -> Fact:
    return Fact(text=f"{value:.{digits}f}", number=value)


def _seconds(value: float) -> Fact:
    return Fact(text=format_duration(value), number=value)


def _share(value: float) -> Fact:
    return Fact(text=f"{value * 100:.5g} %", number=value)


# Text


def markdown(difference: Difference) -> str:
    """A comment for a pull request: one headline, one table."""
    name = " → ".join(dict.fromkeys(difference.names))
    if not difference.changes:
        same = "plan.json is the same" if not difference.sections else "only " + _where(difference)
        return f"**{name}**: nothing changes in meaning; {same}\n"
    lines = [
        f"**{name}**: {headline(difference)}",
        "",
        "| | | before | after | change |",
        "|---|---|---|---|---|",
    ]
    lines += _rows(difference.changes)
    return "\n".join(lines) + "\n"


def headline(difference: Difference) -> str:
    """What the change comes down to: its cost, else how many things change."""
    for change in difference.changes:
        if change.part == "cost" and change.before and change.after:
            how_much = f" ({percent(change)})" if percent(change) else ""
            return f"{change.what} {change.before.text} → {change.after.text}{how_much}"
    count = len(difference.changes)
    return f"{count} change{'s' * (count > 1)}, cost as before"


def _rows(changes: Sequence[Change]) -> Iterator[str]:
    part = ""
    for change in changes:
        heading = f"**{change.part}**" if change.part != part else ""
        cells = [heading, change.what, *both(change), percent(change)]
        part = change.part
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def both(change: Change) -> tuple[str, str]:
    """The text before and after, a dash where a plan has no such fact."""
    return change.before.text if change.before else "–", change.after.text if change.after else "–"


def percent(change: Change) -> str:
    """`+25 %` or `10.5 times`; nothing where a value is text or 0."""
    if change.ratio is None:
        return ""
    if change.ratio >= _MANY_TIMES:
        return f"{format_figure(change.ratio)} times"
    return f"{(change.ratio - 1) * 100:+.3g} %"


def _where(difference: Difference) -> str:
    return f"other values differ, under {', '.join(difference.sections)}"


def as_data(difference: Difference) -> dict[str, Any]:
    """The same for machines: numbers in base units."""
    return {
        "before": difference.names[0],
        "after": difference.names[1],
        "changes": [
            {
                "part": change.part,
                "what": change.what,
                "before": _datum(change.before),
                "after": _datum(change.after),
                "ratio": change.ratio,
            }
            for change in difference.changes
        ],
        "sections": list(difference.sections),
    }


def _datum(fact: Fact | None) -> float | str | None:
    if fact is None:
        return None
    return fact.text if fact.number is None else fact.number
