"""The policy: the model that is trained."""

from __future__ import annotations

from rolecall.roles.policy.policy import Policy

__all__ = ["Policy"]
