"""From a problem to the tokens that a rollout continues."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rolecall.protocols.errors import DataError
from rolecall.roles.data.problems import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Templater:
    """Puts problems into the tokenizer's chat template.

    Args:
        tokenizer: one with a chat template.
        suffix: appended to the last message of every prompt.
        system: said before every prompt that does not say its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, suffix: str, system: str | None) -> None:
        self._tokenizer, self._suffix, self._system = tokenizer, suffix, system

    def tokens(self, problem: Problem) -> np.ndarray:
        """The prompt's tokens, int32, up to where the assistant begins.

        Raises:
            DataError: the template does not take these messages.
        """
        messages = [dict(message) for message in problem.messages]
        messages[-1]["content"] += self._suffix
        if self._system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._system})
        from jinja2 import TemplateError

        try:
            ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"{problem.place}: the model's chat template refuses the prompt: {error}.", have=f"messages of {roles}"
            ) from error
        return np.asarray(ids, dtype=np.int32)
