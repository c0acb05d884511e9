"""What one check has found. No I/O."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Finding", "judged", "skipped"]

Outcome = Literal["pass", "fail", "skip"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the report; `advice` is for a person whose server failed, or was not looked at."""

    check: str
    outcome: Outcome
    expected: str
    came: str
    advice: str = ""

    def fields(self) -> dict[str, Any]:
        """For a line of JSON."""
        return asdict(self)


def judged(check: str, well: bool, *, expected: str, came: str, advice: str) -> Finding:
    """A check that was made; what to do is of interest only where it failed."""
    if well:
        return Finding(check=check, outcome="pass", expected=expected, came=came)
    return Finding(check=check, outcome="fail", expected=expected, came=came, advice=advice)


def skipped(check: str, why: str) -> Finding:
    """A check that was not made."""
    return Finding(check=check, outcome="skip", expected="", came="", advice=why)
