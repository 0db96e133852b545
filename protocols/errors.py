"""Every error Rolecall raises on purpose: one root class, picklable, each also the fitting standard type."""

from __future__ import annotations

from typing import Any


class RolecallError(Exception):
    """Root of all our errors.

    Fields are given by keyword and survive pickling, so that an error raised in a member reaches the controller whole.
    """

    def __init__(self, message: str = "", **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields
        for name, value in fields.items():
            setattr(self, name, value)

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.fields)


def _rebuild(kind: type[RolecallError], message: str, fields: dict[str, Any]) -> RolecallError:
    return kind(message, **fields)


class UserError(RolecallError, ValueError):
    """What the user asked can't be done: says what was asked, what there is, and what to change."""

    def __init__(self, message: str = "", *, ask: str = "", have: str = "", remedy: str = "", **fields: Any) -> None:
        parts = [message, f"Asked: {ask}." if ask else "", f"There is: {have}." if have else "", f"Do: {remedy}." if remedy else ""]
        super().__init__(" ".join(part for part in parts if part), **fields)
        self.ask, self.have, self.remedy = ask, have, remedy
        self.fields = {**fields, "ask": ask, "have": have, "remedy": remedy}

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_user, (type(self), self.message, self.fields)


def _rebuild_user(kind: type[UserError], message: str, fields: dict[str, Any]) -> UserError:
    error = kind.__new__(kind)
    RolecallError.__init__(error, message, **fields)
    return error


class ConfigError(UserError):
    """A key or value of the configuration is unknown, mistyped or contradicts another."""


class PlanError(UserError):
    """The pools don't fit the cluster; `reasons` holds every reason, not just the first."""

    reasons: tuple[str, ...]


class ModelError(UserError):
    """A model folder, checkpoint or tokenizer can't be used as asked."""


class DataError(UserError):
    """A dataset, prompt or batch can't be used as asked."""


class RewardError(UserError):
    """A reward can't be set up as asked (a sample that fails to score is `Failed`, never this)."""


class ProtocolError(RolecallError, ValueError):
    """Bytes or fields that are no message of ours."""


class FrameError(ProtocolError):
    """The bytes are no whole, untouched frame: magic, lengths or checksum are off."""


class SchemaError(ProtocolError):
    """The frame is whole, but made for another message or another version of it; names both sides."""


class MessageError(ProtocolError):
    """The message decodes but makes no sense: lengths disagree, numbers aren't finite, offsets fall."""


class WeightsError(RolecallError, RuntimeError):
    """Weights that did not arrive whole; the receiver goes on with the version it had."""


class CallError(RolecallError, RuntimeError):
    """A call to a member did not come back well.

    `role, rank, node, verb, step, version, log` say whom it was waiting for; `remote` is the member's traceback.
    """

    role: str
    rank: int
    verb: str
    remote: str


class RoleFailed(CallError):  # noqa: N818
    """The role's own code raised."""


class MemberLost(CallError, ConnectionError):  # noqa: N818
    """The member's process or node is gone."""


class DeadlineExceeded(CallError, TimeoutError):  # noqa: N818
    """The member did not answer in time."""
