"""docs/models.md lists what the registry has."""

from pathlib import Path

from moeplan.runtime_min.models import BY_MODEL_TYPE
from moeplan.runtime_min.plan_file import ARCHITECTURES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
README = Path(__file__).parents[2] / "README.md"


def test_the_table_has_every_model_type_and_how_it_runs():
    """Offload plans: of models with experts."""
    rows = [
        [c.strip() for c in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines() if "| `" in line
    ]
    assert [row[0].strip("`") for row in rows] == list(ARCHITECTURES)
    for name, stream, offload, _ in rows:
        kind = BY_MODEL_TYPE[name.strip("`")]
        assert stream == "yes"
        assert offload == ("yes" if kind.routed else "no")


def test_the_readme_names_every_model_type():
    text = README.read_text()
    assert all(f"`{name}`" in text for name in ARCHITECTURES)
