"""An audit is fine only if each package's advisories were seen and none is known to be vulnerable."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.audit import main, read

ROOT = Path(__file__).parents[1]
_FINE = {"name": "rich", "version": "15.0.0", "vulns": []}
_BAD = {
    "name": "jinja2",
    "version": "2.10",
    "vulns": [{"id": "PYSEC-2019-217", "fix_versions": ["2.10.1"], "aliases": ["CVE-2019-10906"]}],
}
_SKIPPED = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.15.0)"}


@pytest.mark.parametrize(
    ("packages", "code"),
    [([_FINE], 0), ([_FINE, _BAD], 1), ([_FINE, _SKIPPED], 2), ([_BAD, _SKIPPED], 1), ([_SKIPPED], 2), ([], 2)],
)
def test_only_what_was_looked_up_is_called_fine(packages: list[dict[str, Any]], code: int) -> None:
    found = read({"dependencies": packages, "fixes": []})
    assert found.code == code
    assert found.looked_up + len(found.not_looked_up) == len(packages)
    for line in found.vulnerable:
        assert line == "jinja2 2.10: PYSEC-2019-217, CVE-2019-10906, mended in 2.10.1"


def test_advisories_that_cannot_be_reached_are_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "pip-audit"
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('ERROR: could not connect to the index')\n")
    program.chmod(0o700)
    assert main([str(program), "some.lock"]) == 2
    said = capsys.readouterr().out
    assert "some.lock: NOT AUDITED" in said
    assert "could not connect to the index" in said


def test_auditor_is_pinned_with_its_hashes() -> None:
    lines = (ROOT / "requirements-audit.lock").read_text().splitlines()
    pinned = [line for line in lines if line and not line[0].isspace() and not line.startswith("#")]
    assert any(line.startswith("pip-audit==") for line in pinned)
    assert all("==" in line and line.endswith("\\") for line in pinned)
    assert "://" not in "\n".join(lines), "no host is recorded"
