"""Parts of a model that stay as they are."""

from __future__ import annotations

import re

from rolecall.protocols.errors import ModelError
from rolecall.roles.models.causal import CausalModel
from rolecall.roles.models.native import NativeModel


def freeze(model: CausalModel, pattern: str) -> None:
    """Let no gradient reach the parameters whose Hugging Face names begin with what the pattern matches.

    Args:
        pattern: regular expression, such as r"model\\.(embed_tokens|layers\\.[0-3]\\.)"; "" freezes nothing.

    Raises:
        ModelError: it matches no parameter, or every one, or the parts of one parameter differ (some experts, not all).
    """
    if not pattern:
        return
    parameters = dict(model.net.named_parameters())
    theirs: dict[str, list[str]] = {}
    if isinstance(model, NativeModel):
        for name in model.family.names(model.spec):
            theirs.setdefault(name.ours, []).append(name.theirs)
    else:
        theirs = {name: [name] for name in parameters}
    matched = {own: {bool(re.match(pattern, name)) for name in names} for own, names in theirs.items()}
    torn = [own for own, found in matched.items() if len(found) > 1]
    frozen = [own for own, found in matched.items() if found == {True}]
    if torn:
        raise ModelError(
            "The experts of a layer are frozen together or not at all.", ask=f"{pattern!r}, which is true of a part of {torn[0]}"
        )
    if not frozen or len(frozen) == len(theirs):
        raise ModelError(
            f"There is {'nothing left to train' if frozen else 'nothing that is frozen'} in the model.",
            ask=f"freeze={pattern!r}",
            have=f"{len(theirs)} parameters, such as {', '.join(names[0] for names in list(theirs.values())[:3])}",
            remedy="give a regular expression that the names of some parameters begin with",
        )
    for own in frozen:
        parameters[own].requires_grad_(False)
