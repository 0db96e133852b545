"""Data: where records come from, mixed, shuffled and streamed; prompts templated and tokenised ahead of the rollout."""

from rolecall.roles.data.data import Data
from rolecall.roles.data.documents import Documents
from rolecall.roles.data.mixing import Mix
from rolecall.roles.data.sources import Files, Hub, ReasoningGym, Records, Source
from rolecall.roles.data.stream import Raw, Stream

__all__ = ["Data", "Documents", "Files", "Hub", "Mix", "Raw", "ReasoningGym", "Records", "Source", "Stream"]
