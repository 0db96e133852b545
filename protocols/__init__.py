"""What is said: messages, wire frames, versions, errors."""

from rolecall.protocols.arrays import Blob, Spec
from rolecall.protocols.checks import check
from rolecall.protocols.errors import (
    CallError,
    ConfigError,
    DataError,
    DeadlineExceeded,
    FrameError,
    MemberLost,
    MessageError,
    ModelError,
    PlanError,
    ProtocolError,
    RewardError,
    RolecallError,
    RoleFailed,
    SchemaError,
    UserError,
    WeightsError,
)
from rolecall.protocols.frames import Frame, decode, encode, from_bytes, read_file, to_bytes, write_file
from rolecall.protocols.messages import (
    Abstained,
    Divisible,
    Failed,
    Logprobs,
    Message,
    Metrics,
    Outline,
    PackedBatch,
    Prompts,
    Receipt,
    Samples,
    Scored,
    Scores,
    Tensor,
    Verdict,
    Weights,
)
from rolecall.protocols.schema import PROTOCOL, describe, fingerprint

__all__ = [
    "PROTOCOL", "Abstained", "Blob", "CallError", "ConfigError", "DataError", "DeadlineExceeded", "Divisible", "Failed", "Frame",
    "FrameError", "Logprobs", "MemberLost", "Message", "MessageError", "Metrics", "ModelError", "Outline", "PackedBatch", "PlanError",
    "Prompts", "ProtocolError", "Receipt", "RewardError", "RoleFailed", "RolecallError", "Samples", "SchemaError", "Scored", "Scores",
    "Spec", "Tensor", "UserError", "Verdict", "Weights", "WeightsError", "check", "decode", "describe", "encode", "fingerprint",
    "from_bytes", "read_file", "to_bytes", "write_file",
]  # fmt: skip
