"""profile.csv: rows with their places, every problem at once, and rows added without harm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.planner.catalog import Catalog
from moeplan.planner.diagnostics import CompileError, Span
from moeplan.planner.ir.profile import FIGURES
from moeplan.planner.profile_file import COLUMNS, ProfileRow, read_profile, read_text, with_row
from moeplan.runtime_min.engine import Stats
from moeplan.runtime_min.report import FullBatches

HEADER = ",".join(COLUMNS)
GOOD = "a2-ultragpu-1g,mixtral-8x7b,vllm,1,512,128,64,,3000,,,0.02"
ROW = ProfileRow(
    line=2,
    machine="a2-ultragpu-1g",
    model="mixtral-8x7b",
    engine="vllm",
    gpus=1,
    prompt_tokens=512.0,
    output_tokens=128.0,
    batch=64,
    figures={"decode_tokens_per_s": 3000.0, "itl_s": 0.02},
)


def read(catalog: Catalog, tmp_path: Path, text: str) -> tuple[ProfileRow, ...]:
    path = tmp_path / "p.csv"
    path.write_text(text, encoding="utf-8")
    return read_profile(path, Span("spec.yaml", 9, 10), catalog.machines, ["mixtral-8x7b", "olmoe-1b-7b"])


def problems(catalog: Catalog, tmp_path: Path, text: str) -> str:
    with pytest.raises(CompileError) as caught:
        read(catalog, tmp_path, text)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_a_row(catalog: Catalog, tmp_path: Path) -> None:
    assert read(catalog, tmp_path, f"{HEADER}\n{GOOD}\n") == (ROW,)


def test_columns_in_any_order_and_other_spellings(catalog: Catalog, tmp_path: Path) -> None:
    """A spreadsheet's file: byte order mark, CRLF, quoted cells, an empty row, figures left out."""
    text = (
        "\ufeffbatch,model,machine,gpus,engine,output_tokens,prompt_tokens,decode_tokens_per_s,itl_s\r\n"
        ",,,,,,,,\r\n"
        '64,"mixtral-8x7b",a2-ultragpu-1g, 1 ,vllm,128.0,512,3e3,2.0E-2\r\n'
    )
    assert read(catalog, tmp_path, text) == (replace(ROW, line=3),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("a2-ultragpu-1g", "a2-ultragpu-g"),
            "p.csv:2:1: no machine named 'a2-ultragpu-g' [unknown-machine]",
        ),
        (("a2-ultragpu-1g", "a2-ultragpu-1gg"), "hint: did you mean 'a2-ultragpu-1g'?"),
        (("mixtral-8x7b", "mixtral"), "p.csv:2:16: no model named 'mixtral' [unknown-model]"),
        (("vllm", "vlm"), "p.csv:2:29: no engine named 'vlm' [unknown-engine]\n  hint: did you mean 'vllm'?"),
        ((",1,512", ",2,512"), "p.csv:2:34: gpus: a2-ultragpu-1g has 1, not 2 [bad-value]"),
        ((",1,512", ",0,512"), "p.csv:2:34: gpus: vLLM needs at least one"),
        ((",1,512", ",one,512"), "p.csv:2:34: gpus: 'one' is not a whole number from 0 to 1,024"),
        (("512", "0"), "p.csv:2:36: prompt_tokens: '0' is not a number from 1 to 10,000,000"),
        (("128", "1_28"), "p.csv:2:40: output_tokens: '1_28' is not a number"),
        ((",64,", ",6.4,"), "p.csv:2:44: batch: '6.4' is not a whole number from 1"),
        (("3000", "-3"), "p.csv:2:48: decode_tokens_per_s: '-3' is not a number above 0"),
        (("3000", "0"), "decode_tokens_per_s: '0' is not a number above 0"),
        (("3000", "nan"), "decode_tokens_per_s: 'nan' is not a number above 0"),
        (("3000", "1e999"), "decode_tokens_per_s: '1e999' is not a number above 0"),
        (("3000", "fast"), "hint: leave the cell empty where nothing was measured"),
        (("3000,,,0.02", ",,,"), "p.csv:2:1: a row without a measured figure [nothing-measured]"),
        ((",,,0.02", ""), "p.csv:2:1: 9 cells under a header of 12 [bad-row]"),
    ],
)
def test_a_bad_cell(catalog: Catalog, tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert message in problems(catalog, tmp_path, f"{HEADER}\n{GOOD.replace(*change)}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "p.csv: empty: no column 'machine' [missing-column]"),
        (f"{HEADER}\n", "p.csv:1:1: the profile has a header and no rows [empty-profile]"),
        (HEADER.replace("batch,", "") + f"\n{GOOD}", "p.csv:1:1: the header has no column 'batch'"),
        (HEADER.replace("ttft_s", "tttf_s") + f"\n{GOOD}", "p.csv:1:117: unknown column 'tttf_s'"),
        (HEADER.replace("ttft_s", "tttf_s") + f"\n{GOOD}", "hint: did you mean 'ttft_s'?"),
        (HEADER.replace("ttft_s", "itl_s") + f"\n{GOOD}", "column 'itl_s' comes twice [repeated-column]"),
        ("machine,model,engine,gpus,prompt_tokens,output_tokens,batch\n", "header has no measured figure"),
        (f"{HEADER}\n{GOOD}\n{GOOD.replace('3000', '1')}", "p.csv:3:1: the same machine, model, engine"),
        (f"{HEADER}\n{GOOD}\n{GOOD.replace('512', '512.0')}", "as line 2 [duplicate-row]"),
    ],
)
def test_a_bad_file(catalog: Catalog, tmp_path: Path, text: str, message: str) -> None:
    assert message in problems(catalog, tmp_path, text)


def test_all_problems_at_once(catalog: Catalog, tmp_path: Path) -> None:
    rows = [GOOD.replace("vllm", "x").replace("3000", "-1"), GOOD.replace("512", "none")]
    found = problems(catalog, tmp_path, "\n".join([HEADER, *rows]))
    assert [line.split(" ")[0] for line in found.splitlines() if "p.csv" in line] == [
        "p.csv:2:29:",
        "p.csv:2:45:",
        "p.csv:3:36:",
    ]


def test_a_file_that_is_not_there(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"spec\.yaml:9:10: profile .*: No such file"):
        read_profile(tmp_path / "absent.csv", Span("spec.yaml", 9, 10), {}, [])


def test_a_row_is_added_with_its_header(catalog: Catalog, tmp_path: Path) -> None:
    empty = read_text(tmp_path / "new.csv")
    assert empty == HEADER + "\n"
    text = with_row(empty, "new.csv", ROW)
    assert read(catalog, tmp_path, text) == (ROW,)


def test_a_second_measurement_replaces_the_first(catalog: Catalog, tmp_path: Path) -> None:
    other = replace(ROW, batch=8)
    text = with_row(with_row(HEADER + "\n", "p.csv", ROW), "p.csv", other)
    again = with_row(text, "p.csv", replace(ROW, figures={"itl_s": 0.5}))
    first, second = read(catalog, tmp_path, again)
    assert (first.batch, first.figures) == (64, {"itl_s": 0.5})
    assert second == replace(other, line=3)


def test_a_file_that_is_no_profile_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    path.write_text("some,other,table\n1,2,3\n")
    with pytest.raises(CompileError, match="has no column 'machine'"):
        read_text(path)


@given(
    st.floats(1, 1e7),
    st.floats(1, 1e7),
    st.integers(1, 10**6),
    st.floats(1e-6, 1e9),
    st.sampled_from(FIGURES),
)
def test_what_is_written_is_read(prompt: float, output: float, batch: int, value: float, figure: str) -> None:
    """Six digits of every number survive, in a file with any order of columns."""
    header = ",".join(reversed(COLUMNS))
    row = replace(ROW, prompt_tokens=prompt, output_tokens=output, batch=batch, figures={figure: value})
    line = with_row(header, "p.csv", row).splitlines()[1]
    cells = dict(zip(reversed(COLUMNS), line.split(","), strict=True))
    assert float(cells[figure]) == pytest.approx(value, rel=1e-5)
    assert float(cells["prompt_tokens"]) == pytest.approx(prompt, rel=1e-5)
    assert int(cells["batch"]) == batch


def test_the_runtime_names_figures_as_the_profile_does() -> None:
    sums = Stats(
        requests=8,
        prompt_tokens=80,
        generated_tokens=40,
        prefilled_tokens=80,
        decode_tokens=32,
        decode_passes=8,
        prefill_s=2.0,
        decode_s=4.0,
        first_tokens_s=8.0,
    )
    full = FullBatches(sequences=4, batches=2, warm=True, sums=sums)
    assert full.figures() == {
        "prefill_tokens_per_s": 40.0,
        "decode_tokens_per_s": 8.0,
        "requests_per_s": pytest.approx(8 / 6),
        "ttft_s": 1.0,
        "itl_s": 0.5,
    }
    assert set(full.figures()) == set(FIGURES)
