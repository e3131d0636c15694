"""A pulp problem, solved the same way everywhere: no threads, limits in nodes, an honest bound.

CBC (which pulp ships) solves. Where its limit leaves a gap and highspy is installed, HiGHS goes on. A proven
optimum is therefore the same with and without HiGHS.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pulp

from moeplan.planner.diagnostics import Diagnostic, InfeasibleError, Span
from moeplan.planner.ir.fleet import SolverStatus

_MOST_NODES = 20_000
_SEED = 1
_LOWER_BOUND = re.compile(r"^Lower bound:\s+(\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to search: a number of nodes, which any machine repeats, and a clock for the impatient.

    A search ends when its gap is at most `gap`.
    """

    nodes: int = _MOST_NODES
    gap: float = 0.0
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A solution's status, its objective and the bound that no solution can be below."""

    status: SolverStatus
    objective: float
    bound: float


def solve(problem: pulp.LpProblem, effort: Effort | None = None) -> Result | None:
    """Solve; the variables then hold the solution. None where there is no solution.

    Raises InfeasibleError where the limit left neither a solution nor a proof that there is none.
    """
    effort = effort or Effort()
    result = _cbc(problem, effort)
    unsolved = result is None and problem.status == pulp.LpStatusNotSolved
    gap_left = result is not None and result.status == "incumbent" and not effort.gap
    if (unsolved or gap_left) and effort.seconds is None and _has_highs():
        result = _highs(problem, effort, result)
    if unsolved and result is None:
        message = f"the solver found no fleet within {effort.nodes:,} nodes"
        raise InfeasibleError(
            Diagnostic(code="unsolved", span=Span("moeplan"), message=message, hint="allow fewer GPU types")
        )
    return result


def _cbc(problem: pulp.LpProblem, effort: Effort) -> Result | None:
    """After a limit pulp's `status` still reads "Optimal"; only `sol_status` tells an incumbent, and only
    CBC's log has its bound.

    Its option `threads` is left out: even of 1 it makes a thread, for which one run in 600 waits ten seconds
    on a busy machine.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        options = [f"maxNodes {effort.nodes}", f"randomCbcSeed {_SEED}", f"randomSeed {_SEED}"]
        solver = pulp.PULP_CBC_CMD(
            msg=False,
            gapRel=effort.gap or None,
            timeLimit=effort.seconds,
            logPath=str(log),
            options=options,
        )
        problem.solve(solver)
        text = log.read_text(encoding="utf-8", errors="replace")
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None
    objective = float(pulp.value(problem.objective) or 0.0)
    stopped = _LOWER_BOUND.search(text)
    proven = problem.sol_status == pulp.LpSolutionOptimal and not effort.gap
    bound = float(stopped.group(1)) if stopped else objective
    return _result(objective, objective if proven else bound)


def _has_highs() -> bool:
    return importlib.util.find_spec("highspy") is not None


def _highs(problem: pulp.LpProblem, effort: Effort, known: Result | None) -> Result | None:
    """The better of what HiGHS finds and what is `known`; bounds of both hold. pulp's own interface to HiGHS
    fails where a limit in nodes ends the search, so the problem goes through a file."""
    highspy: Any = importlib.import_module("highspy")
    highs = highspy.Highs()
    options = {"output_flag": False, "threads": 1, "random_seed": _SEED, "mip_max_nodes": effort.nodes}
    for name, value in {**options, "mip_rel_gap": effort.gap}.items():
        highs.setOptionValue(name, value)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "problem.mps")
        problem.writeMPS(path)
        highs.readModel(path)
    highs.run()
    info = highs.getInfo()
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return known
    bound = max(info.mip_dual_bound, known.bound if known else -math.inf)
    if known and known.objective <= info.objective_function_value:
        return _result(known.objective, bound)
    values = dict(zip(highs.getLp().col_names_, highs.getSolution().col_value, strict=True))
    for variable in problem.variables():
        variable.varValue = values[variable.name]
    return _result(info.objective_function_value, bound)


def _result(objective: float, bound: float) -> Result:
    bound = min(bound, objective)
    status: SolverStatus = "optimal" if objective - bound <= 1e-9 * max(1.0, objective) else "incumbent"
    return Result(status=status, objective=objective, bound=bound)
