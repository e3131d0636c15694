"""popularity.csv: how many tokens went to each expert of each layer, as a router's counts have it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from moeplan.planner.diagnostics import CompileError, Diagnostic, Span
from moeplan.planner.ir.model import Model
from moeplan.planner.ir.workload import ExpertPopularity
from moeplan.planner.request_files import read_input

COLUMNS = ("layer", "expert", "tokens")
_MOST_TOKENS = 10**15


def read_popularity(path: Path, span: Span, model: Model) -> tuple[ExpertPopularity, ...]:
    """The share of a layer's tokens that each expert sees, by layer; an expert without a row sees none.

    Raises CompileError with every problem of the file by line; `span` is where the spec names it.
    """
    reader = _Reader(path, model)
    for number, line in enumerate(read_input(path, span, "popularity").splitlines(), start=1):
        if number == 1:
            reader.header(line)
        elif line.strip():
            reader.row(number, line)
    return reader.finish()


class _Reader:
    """Collects counts and problems."""

    def __init__(self, path: Path, model: Model) -> None:
        self._path, self._model = str(path), model
        self._problems: list[Diagnostic] = []
        self._counts: dict[int, dict[int, int]] = defaultdict(dict)

    def header(self, line: str) -> None:
        if tuple(cell.strip() for cell in line.split(",")) != COLUMNS:
            self._problem(1, f"the header is not {','.join(COLUMNS)}")
            raise CompileError(*self._problems)

    def row(self, number: int, line: str) -> None:
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(COLUMNS) or not all(c.isascii() and c.isdigit() and len(c) < 17 for c in cells):
            self._problem(number, "a row is three whole numbers: layer, expert, tokens")
            return
        layer, expert, tokens = map(int, cells)
        if layer >= self._model.layers:
            self._problem(number, f"{self._model.name} has layers 0 to {self._model.layers - 1}, not {layer}")
        elif expert >= self._model.experts:
            self._problem(
                number, f"{self._model.name} has experts 0 to {self._model.experts - 1}, not {expert}"
            )
        elif expert in self._counts[layer]:
            self._problem(number, f"expert {expert} of layer {layer} comes twice")
        else:
            self._counts[layer][expert] = min(tokens, _MOST_TOKENS)

    def finish(self) -> tuple[ExpertPopularity, ...]:
        wanted = self._model.moe_layers
        if not self._problems and len(self._counts) != wanted:
            found = len(self._counts)
            self._problem(1, f"{self._model.name} has {wanted} layers with experts, the file has {found}")
        for layer, counts in self._counts.items():
            if not sum(counts.values()) and not self._problems:
                self._problem(1, f"no token went to any expert of layer {layer}")
        if self._problems:
            raise CompileError(*self._problems)
        return tuple(self._popularity(layer, self._counts[layer]) for layer in sorted(self._counts))

    def _popularity(self, layer: int, counts: dict[int, int]) -> ExpertPopularity:
        """Each token goes to k experts; no expert sees more than all tokens."""
        part = self._model.experts_per_token / sum(counts.values())
        shares = (min(1.0, part * counts.get(expert, 0)) for expert in range(self._model.experts))
        return ExpertPopularity(layer=layer, token_share=tuple(shares))

    def _problem(self, line: int, message: str) -> None:
        self._problems.append(Diagnostic(code="popularity", span=Span(self._path, line, 1), message=message))
