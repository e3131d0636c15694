"""quality.yaml -> what rounding was measured to do to models' perplexity."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from moeplan.planner.catalog.yaml_tree import Fields, Problems, parse_yaml
from moeplan.planner.ir.policy import Quality

QUALITY_FILE = "quality.yaml"
_PERPLEXITY = (1.0, 1e6)


@cache
def measured_quality() -> dict[str, tuple[Quality, ...]]:
    """What is known of each way to round, in the order of the file."""
    problems = Problems()
    text = files(__package__).joinpath(QUALITY_FILE).read_text(encoding="utf-8")
    fields = Fields(parse_yaml(text, f"catalog/{QUALITY_FILE}", problems, built_in=True), "quality", problems)
    sources = fields.group("sources", required=True)
    models = fields.group("perplexity", required=True)
    assert sources
    assert models
    found: dict[str, list[Quality]] = {}
    for model, entry in models.items():
        row = Fields(entry, model, problems, sources.keys)
        exact = row.figure("as-stored", *_PERPLEXITY)
        for name in [key for key in row.keys if key != "as-stored"]:
            perplexity = row.figure(name, *_PERPLEXITY)
            citation = sources.group(row.figure_sources[name])
            source = citation.text("citation") if citation else ""
            quality = Quality(model=model, exact_perplexity=exact, perplexity=perplexity, source=source)
            found.setdefault(name, []).append(quality)
    problems.raise_all()
    return {name: tuple(rows) for name, rows in found.items()}
