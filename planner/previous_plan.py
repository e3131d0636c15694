"""The fleet of an earlier plan folder, which a new one may be asked to stay near."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from moeplan.planner.diagnostics import CompileError, Diagnostic, Span


def read_fleet(folder: Path) -> tuple[Mapping[str, int], Mapping[str, str]]:
    """Return the replicas of `folder`'s plan by column, and the plan's digest under the key "previous".

    Raises CompileError where there is no plan that this version can read.
    """
    path = folder / "plan.json"
    try:
        content = path.read_bytes()
        choices = json.loads(content)["fleet"]["choices"]
        replicas = {str(choice["column"]["name"]): int(choice["replicas"]) for choice in choices}
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"no plan can be read here: {type(error).__name__}: {error}"
        hint = "name a folder that `moeplan compile` wrote"
        raise CompileError(
            Diagnostic(code="no-plan", span=Span(str(path)), message=message, hint=hint)
        ) from None
    return replicas, {"previous": hashlib.sha256(content).hexdigest()}
