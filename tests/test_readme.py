"""What the README says of options and exit codes is what the code has."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import autobatch
from autobatch import errors
from autobatch.options import ProbeOptions

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def table_after(heading: str) -> list[list[str]]:
    """Rows of the first table whose header begins so."""
    lines = README[README.index(heading) :].splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))])
    return rows


def test_the_option_table_is_the_list_of_knobs():
    """Every field of ProbeOptions has a row with its default, and every row is a field."""
    rows = {
        match.group(1): row
        for row in table_after("| option of `probe`")
        if (match := re.match(r"`--([a-z-]+)", row[0]))
    }
    fields = {field.name.replace("_", "-"): field for field in dataclasses.fields(ProbeOptions)}
    assert set(rows) - {"format"} == set(fields)
    for name, field in fields.items():
        if field.default not in {None, dataclasses.MISSING}:
            documented = rows[name][2].strip("`")
            assert (
                documented == f"{field.default:g}"
                if isinstance(field.default, float)
                else documented == str(field.default)
            )


def test_the_exit_code_table_has_every_code():
    """The exit codes of the errors are in the README's table."""
    documented = {code for row in table_after("| exit code") for code in map(int, row[0].split(", "))}
    raised = {getattr(errors, name).exit_code for name in errors.__all__} - {errors.AutobatchError.exit_code}
    assert raised | {0, 130, 143} == documented


@pytest.mark.parametrize("name", sorted(set(re.findall(r"autobatch\.([A-Za-z_]+)", README)) - {"org"}))
def test_every_name_that_it_uses_is_public(name: str):
    """`autobatch.X` in the README is in `autobatch.__all__`."""
    assert name in autobatch.__all__
