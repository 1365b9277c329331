"""Known vulnerabilities of what the locks pin: `make audit`, or `python -m tests.audit PIP_AUDIT LOCK...`.

pip-audit asks the package index for the advisories of each pinned version, one request a package, and calls a version
fine whose advisories it could not get. Here that is not fine: exit code 0 means that each was looked up and none has a
known vulnerability, 1 that some have, 2 that the advisories could not be reached, for all or for some.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Audit:
    """What is known of a lock's packages on this platform."""

    looked_up: int
    vulnerable: list[str]
    """A line a vulnerability: package, version, advisory, and the versions that mend it."""
    not_looked_up: list[str]

    @property
    def code(self) -> int:
        """The exit code."""
        return 1 if self.vulnerable else 2 if self.not_looked_up or not self.looked_up else 0


def audit(pip_audit: str, lock: Path) -> Audit:
    """Ask for the advisories of all that a lock pins. ConnectionError if they cannot be had."""
    how = ("--disable-pip", "--require-hashes", "--format=json", "--progress-spinner=off", "--desc=off")
    done = subprocess.run([pip_audit, *how, "-r", str(lock)], capture_output=True, text=True, check=False)
    try:
        return read(json.loads(done.stdout))
    except json.JSONDecodeError:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode} without a word"])[-1]
        raise ConnectionError(last) from None


def read(report: dict[str, Any]) -> Audit:
    """What pip-audit's JSON says."""
    packages = report["dependencies"]
    vulnerable = [
        f"{each['name']} {each['version']}: {', '.join([found['id'], *found.get('aliases', [])])}, mended in "
        f"{', '.join(found['fix_versions']) or 'no version yet'}"
        for each in packages
        for found in each.get("vulns", [])
    ]
    skipped = [each["name"] for each in packages if "skip_reason" in each]
    return Audit(len(packages) - len(skipped), vulnerable, skipped)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def main(arguments: Sequence[str]) -> int:
    pip_audit, *locks = arguments
    codes: list[int] = []
    for lock in map(Path, locks):
        try:
            found = audit(pip_audit, lock)
        except ConnectionError as error:
            _say(f"{lock.name}: NOT AUDITED, the advisories cannot be reached from here ({error})")
            codes.append(2)
            continue
        for line in found.vulnerable:
            _say(f"{lock.name}: VULNERABLE {line}")
        if found.not_looked_up:
            few = ", ".join(found.not_looked_up[:5]) + (" ..." if len(found.not_looked_up) > 5 else "")
            _say(f"{lock.name}: NOT AUDITED, the advisories of {len(found.not_looked_up)} cannot be reached: {few}")
        _say(f"{lock.name}: {found.looked_up} packages looked up, {len(found.vulnerable)} known vulnerabilities")
        codes.append(found.code)
    return min((code for code in codes if code), default=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
