"""The compiled modules have exactly the names and signatures of their data sheets, the stubs."""

import contextlib
import importlib.util
import io
from pathlib import Path

import pytest
from mypy import stubtest

pytest.importorskip("understudy.silicon", reason="the compiled half is not built")

SLOTS = "understudy._silicon.Memory.__buffer__\n"
"""Python before 3.12 has the buffer protocol, but no name for it."""


@pytest.mark.parametrize("module", ["_silicon", "_images"])
def test_the_module_is_what_the_data_sheet_says(module: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(f"understudy.{module}") is None:
        pytest.skip(f"{module} is not compiled")
    allowed = tmp_path / "allowed"
    allowed.write_text(SLOTS, encoding="ascii")
    arguments = ["--concise", "--ignore-unused-allowlist", "--allowlist", str(allowed)]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        result = stubtest.test_stubs(stubtest.parse_options([*arguments, f"understudy.{module}"]))
    assert result == 0, said.getvalue()
