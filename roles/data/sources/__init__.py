"""Where records come from: files of any usual format and place, hub names, task generators, lists."""

from rolecall.roles.data.sources.base import Found, Rows, Source, Streamed, Table
from rolecall.roles.data.sources.files import Files
from rolecall.roles.data.sources.given import listed, mapping_of, source_of, table_of
from rolecall.roles.data.sources.gym import ReasoningGym
from rolecall.roles.data.sources.hub import Hub
from rolecall.roles.data.sources.listed import Memory, Records

__all__ = [
    "Files",
    "Found",
    "Hub",
    "Memory",
    "ReasoningGym",
    "Records",
    "Rows",
    "Source",
    "Streamed",
    "Table",
    "listed",
    "mapping_of",
    "source_of",
    "table_of",
]
