"""The compiled module has exactly the names and signatures of its data sheet, `_silicon.pyi`."""

import contextlib
import io
from pathlib import Path

import pytest
from mypy import stubtest

pytest.importorskip("understudy.silicon", reason="the compiled half is not built")

SLOTS = "understudy._silicon.Memory.__buffer__\n"
"""Python before 3.12 has the buffer protocol, but no name for it."""


def test_the_module_is_what_the_data_sheet_says(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.write_text(SLOTS, encoding="ascii")
    arguments = ["--concise", "--ignore-unused-allowlist", "--allowlist", str(allowed)]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        result = stubtest.test_stubs(stubtest.parse_options([*arguments, "understudy._silicon"]))
    assert result == 0, said.getvalue()
