"""From records to tokens, each with the knowledge whether it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from rolecall.roles.data.records import Record
    from rolecall.roles.data.report import Report
    from transformers import PreTrainedTokenizerBase

Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """The tokens of a record. A trained token is one that the model is to predict from those before it."""

    tokens: Int32  # [n]
    trained: Bool  # [n]; all False for a question
    id: str = ""
    place: str = ""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A preference: two answers that begin alike. `chosen.tokens[:shared]` equals `rejected.tokens[:shared]`, and none of
    these is trained: they can be one parent segment with two continuations."""

    chosen: Encoded
    rejected: Encoded
    shared: int  # tokens

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected) - self.shared


class Encoder:
    """Turns records into tokens.

    Args:
        tokenizer: of the model; AutoTokenizer's.
        train: what is trained of a conversation: what the assistant says ("assistant"), only its last turn ("last"), or all.
        plain: take prompts and completions that are texts as they are; False puts them into the chat template as messages of the
            user and the assistant.
        suffix: appended to the last message of every prompt of a question.
        system: said before every conversation that brings no system message.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train: Literal["assistant", "last", "all"] = "assistant",
        plain: bool = False,
        suffix: str = "",
        system: str | None = None,
    ) -> None:
        raise NotImplementedError

    def encode(self, record: Record) -> Encoded | Pair:
        """The tokens of one record.

        Raises:
            DataError: the template refuses it, or no token of it is trained; it says where the record is from.
        """
        raise NotImplementedError

    def encode_all(self, records: Sequence[Record], report: Report | None = None) -> list[Encoded | Pair]:
        """The tokens of many records, faster than one by one.

        Args:
            records: any of the five kinds.
            report: where records that can't be encoded are counted and left out; None raises at the first.

        Raises:
            DataError: as `encode`, where there is no report.
        """
        raise NotImplementedError
