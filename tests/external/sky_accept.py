"""What the real SkyPilot says of task files, offline. Run by tests/external/test_sky_accepts.py with the
interpreter of an environment that has skypilot:

    python sky_accept.py CATALOG_FOLDER

Each line of standard input is {"text": YAML, "envs": {name: value}}; each gets a line of JSON in answer:
"problems" maps a step to the error it raised, the other keys say what SkyPilot read and would do. Steps are
those of a launch: parse, validate, service, optimize, placer, autoscaler.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def prepare(home: Path, catalog: Path) -> None:
    """A home without credentials whose catalog SkyPilot takes for the user's own, and so never fetches."""
    shutil.copytree(catalog, home / ".sky" / "catalogs" / "v8")
    for name in ("HOME", "SKY_RUNTIME_DIR"):
        os.environ[name] = str(home)
    os.environ |= {"SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "SKYPILOT_USER_ID": "deadbeef"}


def answer(request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """All steps of one file; a step that fails keeps only those that need its result from running."""
    import yaml
    from sky import Task
    from sky.skylet.constants import CLUSTER_NAME_VALID_REGEX
    from sky.utils.common_utils import check_cluster_name_is_valid

    found: dict[str, Any] = {"problems": {}}

    def step(name: str, action: Callable[[], Any]) -> Any:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                return action()
        except (Exception, SystemExit) as error:
            found["problems"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return None

    def parse() -> Any:
        file = scratch / "task.yaml"
        file.write_text(request["text"], encoding="utf-8")
        if not request.get("envs"):
            return Task.from_yaml(str(file))
        return Task.from_yaml_config(yaml.safe_load(file.read_text()), list(request["envs"].items()))

    task = step("parse", parse)
    if task is None:
        return found
    step("name", lambda: check_cluster_name_is_valid(task.name))
    found |= {"name": task.name, "envs": dict(task.envs), "run": task.run, "setup": task.setup}
    found["name_pattern"] = CLUSTER_NAME_VALID_REGEX
    found["mounts"] = {path: storage.source for path, storage in (task.storage_mounts or {}).items()}
    found["resources"] = [_resources(r) for r in task.resources]
    step("validate", lambda: _validate(task))
    found["choice"] = step("optimize", lambda: _optimize(task))
    if task.service is not None:
        found["service"] = task.service.to_yaml_config()
        step("service", lambda: _validate_service(task))
        if task.service.spot_placer:
            found["candidates"] = step("placer", lambda: _candidates(task))
        found["autoscaler"] = step("autoscaler", lambda: _decide(task))
    return found


def _resources(resources: Any) -> dict[str, Any]:
    names = ("region", "zone", "instance_type", "accelerators", "use_spot", "job_recovery")
    return {"cloud": str(resources.cloud), **{name: getattr(resources, name) for name in names}}


def _validate(task: Any) -> None:
    task.validate()
    for resources in task.resources:
        resources.validate()


def _validate_service(task: Any) -> None:
    from sky.serve import serve_utils

    serve_utils.validate_service_task(task, pool=False)


def _optimize(task: Any) -> str:
    import sky
    from sky.optimizer import Optimizer

    dag = sky.Dag()
    dag.add(task)
    return str(Optimizer.optimize(dag, quiet=True).tasks[0].best_resources)


def _candidates(task: Any) -> list[list[str]]:
    """Cloud, region and zone of every place where a spot replica may be started; at least one."""
    from sky.serve.spot_placer import SpotPlacer

    placer = SpotPlacer.from_task(task.service, task)
    placer.select_next_location([])  # raises where there is none
    return sorted([str(at.cloud), at.region, at.zone or ""] for at in placer.location2status)


def _decide(task: Any) -> dict[str, Any]:
    """One decision with no replica running: the class that decides, and what it would start."""
    from sky.serve.autoscalers import Autoscaler

    scaler = Autoscaler.from_spec("check", task.service)
    decisions = scaler.generate_scaling_decisions([], [1])
    spot = [(d.target or {}).get("use_spot", False) for d in decisions]
    return {"class": type(scaler).__name__, "spot": spot.count(True), "on_demand": spot.count(False)}


def main(catalog: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # SkyPilot prints too
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        prepare(home, catalog)
        from sky import check, clouds

        enabled = [cloud() for cloud in (clouds.AWS, clouds.GCP, clouds.Azure)]
        check.get_cached_enabled_clouds_or_refresh = lambda *_, **__: list(enabled)
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line), home), default=str), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
