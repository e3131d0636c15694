"""What is wrong with an input, where, and what to do next."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A place in a text file; lines and columns count from 1, 0 means the whole file."""

    path: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        if not self.line:
            return self.path
        return f"{self.path}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostic:
    """One problem in the user's own words and numbers. `code` is stable and greppable."""

    code: str
    span: Span
    message: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.span}: {self.message} [{self.code}]"
        return f"{text}\n  hint: {self.hint}" if self.hint else text


class CompileError(Exception):
    """The input cannot be compiled; carries every problem found, in file order."""

    exit_code = 2

    def __init__(self, *diagnostics: Diagnostic) -> None:
        self.diagnostics = tuple(sorted(diagnostics, key=lambda d: (d.span, d.code, d.message)))
        super().__init__("\n".join(str(d) for d in self.diagnostics))


class InfeasibleError(CompileError):
    """The input is well formed but no plan meets it; the diagnostics name what binds."""

    exit_code = 3
