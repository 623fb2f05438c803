"""Asks the databases of advisories about all that is pinned: `python .ci/audit.py PIP-AUDIT`.

Ends with 0 when every package was asked about and nothing is known, 1 when something is, and 3 when
it could not be asked: whoever reads exit codes must not take silence for a pass.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FINE, KNOWN, NOT_AUDITED = 0, 1, 3
ROOT = Path(__file__).resolve().parent.parent
LOCKS = ("requirements.txt", "requirements-dev.txt")


def main() -> int:
    worst = FINE
    for lock in LOCKS:
        found, why = audit(sys.argv[1], ROOT / lock)
        if found is None:
            print(f"{lock}: NOT AUDITED: {why}")
            print("No word on vulnerabilities follows from this run; docs/SECURITY.md has a list.")
            return worst or NOT_AUDITED
        packages = [each for each in found if "skip_reason" not in each]
        if len(packages) < len(found) or not packages:
            print(f"{lock}: NOT AUDITED: {len(found) - len(packages)} packages were passed over")
            return worst or NOT_AUDITED
        known = [(each, issue) for each in packages for issue in each["vulns"]]
        for package, issue in known:
            fixed = ", ".join(issue["fix_versions"]) or "no version yet"
            print(
                f"{lock}: {package['name']} {package['version']}: {issue['id']}, fixed in {fixed}"
            )
        print(f"{lock}: {len(packages)} packages audited, {len(known)} known vulnerabilities")
        worst = max(worst, KNOWN if known else FINE)
    return worst


def audit(tool: str, lock: Path) -> tuple[list[dict[str, Any]] | None, str]:
    """What is said of each package of a lock; or nothing, and why."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [tool, "--strict", "--disable-pip", "--require-hashes", "--progress-spinner=off"]
        command += ["--timeout=15", "--format=json", f"--output={out}", f"--requirement={lock}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        except (OSError, subprocess.TimeoutExpired) as error:
            return None, str(error)
        if not out.exists():
            # Its own code is 1 for this as for a vulnerability.
            said = done.stderr.strip().splitlines()
            return None, said[-1] if said else f"pip-audit ended with {done.returncode}"
        return json.loads(out.read_text())["dependencies"], ""


if __name__ == "__main__":
    sys.exit(main())
