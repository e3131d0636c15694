"""The plans whose Terraform is judged: examples that rent machines, and one more of each kind."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from conftest import ONLINE
from validators import ROOT

from moeplan.codegen.emit import terraform
from moeplan.codegen.emit.plan_json import emit as plan_json
from moeplan.planner.pipeline import compile_plan


@dataclass(frozen=True, slots=True)
class Case:
    """A plan, checked in (`folder`) or compiled from `spec`, then `base` of its replicas made on-demand."""

    name: str
    cloud: str
    folder: Path | None = None
    spec: str = ""
    base: int = 0

    def __str__(self) -> str:
        return self.name

    def _files(self) -> dict[str, str]:
        return _emitted(self.spec, self.base)

    def write(self, target: Path) -> None:
        """Write terraform/ as `target`."""
        if self.folder:
            shutil.copytree(self.folder / "terraform", target, ignore=shutil.ignore_patterns(".terraform*"))
            return
        for path, text in self._files().items():
            if path.startswith("terraform/"):
                file = target / path.removeprefix("terraform/")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")

    def plan(self) -> dict[str, Any]:
        text = (
            (self.folder / "plan.json").read_text(encoding="utf-8")
            if self.folder
            else self._files()["plan.json"]
        )
        plan: dict[str, Any] = json.loads(text)
        return plan

    def _served(self) -> list[dict[str, Any]]:
        """Sites of online replicas under vLLM: what Terraform starts."""
        plan = self.plan()
        engines = {replica["name"]: replica["policy"]["engine"] for replica in plan["replicas"]}
        sites = plan["placement"]["sites"]
        return [site for site in sites if site["serves"] == "online" and engines[site["column"]] == "vllm"]

    def wanted(self) -> dict[str, int]:
        """Machines of each market, by plan.json."""
        spot = on_demand = 0
        for site in self._served():
            if site["static"]:
                spot += sum(zone["spot_target"] for zone in site["zones"])
                on_demand += sum(zone["on_demand_target"] for zone in site["zones"])
                continue
            base = site["replicas"] if site["market"] == "on-demand" else site["on_demand_base"]
            on_demand += base
            spot += site["replicas"] - base + site["spot_overprovision"]
        return {"spot": spot, "on_demand": on_demand}

    def machines(self) -> set[str]:
        replicas = {replica["name"]: replica for replica in self.plan()["replicas"]}
        return {replicas[site["column"]]["policy"]["machine"]["name"] for site in self._served()}


@cache
def _emitted(spec: str, base: int) -> dict[str, str]:
    plan = compile_plan(spec, str(ROOT / "examples" / "qwen3-online" / "spec.yaml"))
    if base:  # placement chooses none without evidence
        sites = tuple(replace(site, on_demand_base=base) for site in plan.placement.sites)
        plan = replace(plan, placement=replace(plan.placement, sites=sites))
    return {**terraform.emit(plan), **plan_json(plan)}


def _examples() -> list[Case]:
    found = []
    for folder in sorted((ROOT / "examples").glob("*/*.plan")):
        for cloud in ("aws", "gcp"):
            if (folder / "terraform" / cloud).is_dir():
                found.append(Case(f"{folder.stem}-{cloud}", cloud, folder))
    return found


def _spec(market: str, rate: str = "8/s") -> str:
    return ONLINE.replace("8/s", rate) + f"market: {{{market}}}\n"


CASES = [
    *_examples(),
    Case(
        "aws-mixed",
        "aws",
        spec=_spec("clouds: [aws], purchase: spot, regions: [aws/us-east-1]", "40/s"),
        base=1,
    ),
    Case("aws-on-demand", "aws", spec=_spec("clouds: [aws], purchase: on-demand")),
    Case("gcp-on-demand", "gcp", spec=_spec("clouds: [gcp], purchase: on-demand", "40/s")),
]
