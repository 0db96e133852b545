"""Families of models that our decoder plays: Hugging Face config to spec, and tensor names both ways."""

from __future__ import annotations

from rolecall.roles.models.families.common import Family, Name
from rolecall.roles.models.families.gemma3 import GEMMA3
from rolecall.roles.models.families.gpt_oss import GPT_OSS
from rolecall.roles.models.families.llama import LLAMA
from rolecall.roles.models.families.qwen3 import QWEN3
from rolecall.roles.models.families.qwen3_moe import QWEN3_MOE

__all__ = ["FAMILIES", "Family", "Name"]

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, QWEN3, GEMMA3, QWEN3_MOE, GPT_OSS)}
