"""report.html: one file that needs no other, says what the plan says, and shows no name as markup."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ONLINE, batch_spec

from moeplan.codegen.emit import report, report_html
from moeplan.planner.explain.analyse import analyse
from moeplan.planner.explain.case import Source, solve
from moeplan.planner.ir.analysis import Analysis
from moeplan.planner.ir.plan import Plan
from moeplan.planner.passes.roofline import expert_intensity
from moeplan.planner.pipeline import compile_plan
from moeplan.planner.units import format_duration

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "examples").glob("*/*.plan/report.html"))
MARKET = ONLINE + "market: {clouds: [gcp], gpus: [A100-80GB, H100], purchase: spot}\n"
VOID = {"meta", "br", "link", "img", "use", "path", "rect"}


class Page(HTMLParser):
    """Elements, their attributes, and whether every one that opens closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def values(self, name: str) -> list[str]:
        return [value for _, attributes in self.elements if (value := attributes.get(name)) is not None]


def made(text: str, folder: Path) -> tuple[Plan, Analysis]:
    case = Source(text.encode(), str(folder / "spec.yaml")).case()
    plan = solve(case)
    assert isinstance(plan, Plan)
    return plan, analyse(plan, case.inputs)


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Analysis]:
    return made(MARKET, tmp_path_factory.mktemp("market"))


@pytest.fixture(scope="module")
def offloaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Analysis]:
    return made(batch_spec(machine="g4dn.16xlarge"), tmp_path_factory.mktemp("offloaded"))


def test_there_are_pages() -> None:
    assert len(PAGES) >= 5


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parents[1].name)
def test_a_page_stands_alone(path: Path) -> None:
    """No address, script, import or file outside; below 2 MB; well-formed; every link and name resolves."""
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000
    for word in ("http:", "https:", "//", "<script", "@import", "src=", "<link", "<iframe", "javascript:"):
        assert word not in text, word
    page = Page(text)
    assert page.open == []
    names = page.values("id")
    assert len(names) == len(set(names))
    wanted = [href.removeprefix("#") for href in page.values("href")]
    wanted += re.findall(r"url\(#([^)]*)\)", text)
    assert set(wanted) <= set(names)
    assert all(href.startswith("#") for href in page.values("href"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parents[1].name)
def test_every_drawing_is_told_in_words(path: Path) -> None:
    page = Page(path.read_text(encoding="utf-8"))
    figures = [attributes for tag, attributes in page.elements if tag == "figure"]
    assert len(figures) >= 2
    assert all(len(attributes.get("aria-label") or "") > 40 for attributes in figures)
    assert all(attributes.get("role") == "img" for attributes in figures)


def test_the_same_record_gives_the_same_bytes(offloaded: tuple[Plan, Analysis]) -> None:
    assert report_html.emit(*offloaded) == report_html.emit(*offloaded)


def test_a_users_matplotlibrc_changes_nothing(offloaded: tuple[Plan, Analysis]) -> None:
    import matplotlib

    before = report_html.emit(*offloaded)
    with matplotlib.rc_context({"font.size": 20.0, "axes.grid": False, "lines.linewidth": 9.0}):
        assert report_html.emit(*offloaded) == before


def test_matplotlib_documents_its_artists_to_others(offloaded: tuple[Plan, Analysis]) -> None:
    """What is left out while it loads is back afterwards."""
    report_html.emit(*offloaded)
    from matplotlib.artist import kwdoc
    from matplotlib.lines import Line2D

    assert "linewidth" in kwdoc(Line2D)


def test_names_are_text_not_markup(market: tuple[Plan, Analysis]) -> None:
    plan, analysis = market
    name = '<script>alert("x")</script>&'
    plan = replace(plan, workload=replace(plan.workload, model=replace(plan.workload.model, name=name)))
    text = report_html.emit(plan, analysis)["report.html"]
    assert "<script" not in text
    assert name in "".join(Page(text).text)


def test_it_says_what_the_plan_costs_and_reaches(market: tuple[Plan, Analysis]) -> None:
    plan, analysis = market
    text = " ".join(Page(report_html.emit(plan, analysis)["report.html"]).text)
    assert f"{plan.fleet.usd_per_hour:.2f} USD/h" in text
    assert all(replica.policy.bottleneck.lane in text for replica in plan.replicas)
    assert "TTFT" in text
    assert plan.facts_sha256[:16] in text


def test_frontiers_are_compilations_at_other_rates_and_promises(
    market: tuple[Plan, Analysis], tmp_path: Path
) -> None:
    """Each point of both: the cost of the plan whose spec asks for it."""
    rates, promises = market[1].frontiers
    for point in rates.points:
        text = MARKET.replace("rate: 8/s", f"rate: {point.value:g}/s")
        assert compiled_cost(text, tmp_path) == pytest.approx(point.usd_per_hour), point
    for point in promises.points:
        slo = f"slo: {{ttft: {2 * point.factor:g}s, itl: {100 * point.factor:g}ms}}"
        text = MARKET.replace("slo: {ttft: 2s, itl: 100ms}", slo)
        assert compiled_cost(text, tmp_path) == pytest.approx(point.usd_per_hour), point
    costs = [point.usd_per_hour for point in rates.points]
    assert costs == sorted(costs)


def compiled_cost(text: str, folder: Path) -> float:
    return compile_plan(text, str(folder / "spec.yaml")).fleet.usd_per_hour


def test_operators_lie_where_the_published_formulas_put_them(offloaded: tuple[Plan, Analysis]) -> None:
    """Experts over N and over a micro-batch, attention of grouped queries: MoE-Lightning, section 3."""
    plan, analysis = offloaded
    (policy,) = (replica.policy for replica in plan.replicas)
    points = {(point.name, point.level): point for point in analysis.replicas[0].operators}
    experts = points["routed_experts", "gpu"]
    model = plan.workload.model
    assert experts.flops_per_byte == pytest.approx(
        expert_intensity(model, policy.micro_batch, "bf16"), rel=0.05
    )
    moved = 1 - policy.resident_share - policy.experts_cpu_share
    per_weight_byte = policy.sequences * model.experts_per_token / model.experts / moved
    assert experts.fetched_flops_per_byte == pytest.approx(per_weight_byte, rel=0.01)
    assert points["attention_core", "dram"].flops_per_byte == pytest.approx(4.0, rel=0.05)
    assert all(point.flops_per_s <= roof(plan, point.level) for point in analysis.replicas[0].operators)


def test_the_link_binds_below_the_p2_that_is_told(offloaded: tuple[Plan, Analysis]) -> None:
    """The experts' bound, their intensity and the P2 in text agree: Eq. 10 for the policy's own calls."""
    plan, analysis = offloaded
    (replica,) = plan.replicas
    experts = next(point for point in analysis.replicas[0].operators if point.name == "routed_experts")
    gpu, dram = replica.roofline.roofs[:2]
    reached = min(gpu.flops_per_s, gpu.offload_prefill_flops_per_s)  # as the pass was predicted
    fastest = min(reached, gpu.expert_bytes_per_s * experts.flops_per_byte)
    assert experts.link_bound_below == pytest.approx(fastest / dram.up_bytes_per_s)
    below = experts.fetched_flops_per_byte < experts.link_bound_below
    assert (experts.bound == "link") == below
    page = report_html.emit(plan, analysis)["report.html"]
    assert f"called over {replica.policy.micro_batch} tokens" in page
    assert f"P2, {experts.link_bound_below:.4g} FLOP/byte" in page
    assert f"alone they are bound by {experts.bound}. " in page


def test_shares_of_two_passes_are_told_apart(offloaded: tuple[Plan, Analysis]) -> None:
    """The same lane is busy for one share of the predicted pass and for another of the simulated one."""
    plan, analysis = offloaded
    (replica,) = plan.replicas
    assert replica.pipeline
    predicted, simulated = (
        format_duration(s) for s in (replica.policy.decode.seconds, replica.pipeline.pass_s)
    )
    assert predicted != simulated
    page = report_html.emit(plan, analysis)["report.html"]
    text = report.emit(plan)["report.md"]
    assert f">busy, of the predicted {predicted}</th>" in page
    assert f">of the simulated {simulated}</th>" in page
    assert f"the pass takes {simulated}, " in page
    assert f"Predicted are {predicted}; speeds and latencies are of the latter" in page
    assert f"{simulated} of the predicted {predicted}; speeds and latencies are of the latter" in text


def roof(plan: Plan, level: str) -> float:
    roofs = {roof.level: roof.flops_per_s for roof in plan.replicas[0].roofline.roofs}
    return roofs[level]  # type: ignore[index]


def test_measurements_stand_beside_predictions(compile_text: Callable[[str], Plan], tmp_path: Path) -> None:
    """A profile that says half as fast shows as about a half, with its line."""
    (tmp_path / "profile.csv").write_text(
        "machine,model,engine,gpus,prompt_tokens,output_tokens,batch,decode_tokens_per_s\n"
        "g4dn.16xlarge,mixtral-8x7b,runtime_min,1,77,128,1984,100\n"
    )
    plan, analysis = made(batch_spec(machine="g4dn.16xlarge") + "profile: profile.csv\n", tmp_path)
    corrections = plan.replicas[0].policy.corrections
    assert corrections
    text = report_html.emit(plan, analysis)["report.html"]
    assert "measured over predicted" in text
    assert f"<td>{corrections[0].factor:.3g}</td>" in text
    assert "No measured run stands behind this plan" not in text


def test_what_other_passes_found_gets_sections(
    market: tuple[Plan, Analysis], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reasons of the fleet, simulated latency and evidence of zones stand in the page where there are any."""
    told = report_html.values(market[0])
    attained = {
        "requests": "5,000 requests of the trace",
        "shares": "99.4% of the requests",
        "search": "The first fleet tried attains it",
        "warning": "",
        "rows": [("TTFT", "as planned", "100 ms", "200 ms", "300 ms")],
        "pools": [("pool-of-h100", "5,000", "99.40%", "61%", "40%")],
    }
    zone = {"name": "gcp/r1/a", "spot": "1.5", "on_demand": "9", "spot_target": "2", "on_demand_target": "1"}
    site = {
        "name": "a-site",
        "place": "zone",
        "rule": "Two are kept",
        "zones": [zone],
        "figures": [("promised", "99.1 %")],
        "notes": ("a zone was left out",),
    }
    more = {**told, "why": ["proven cheapest"], "attainment": [attained], "sites": [site]}
    monkeypatch.setattr(report_html, "values", lambda plan: more)
    text = " ".join(Page(report_html.emit(*market)["report.html"]).text)
    for words in (
        "Why this fleet",
        "Proven cheapest.",
        "Latency, simulated",
        "5,000 requests of the trace",
        "300 ms",
        "pool-of-h100",
        "Availability of a-site",
        "gcp/r1/a",
        "99.1 %",
        "a zone was left out",
    ):
        assert words in text
