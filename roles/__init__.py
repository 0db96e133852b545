"""What each role does, as plain classes. Importing this is cheap: no torch, transformers or Ray."""

from rolecall.roles.base import Member, Role
from rolecall.roles.data import Data, Documents, Files, Hub, Mix, ReasoningGym, Records
from rolecall.roles.models import check_model
from rolecall.roles.models.lora import Lora
from rolecall.roles.policy import Policy
from rolecall.roles.reference import Reference
from rolecall.roles.rewards import Reward, ends_with, last_number, letters_in_place, scores_for
from rolecall.roles.rollout import Rollout

__all__ = [
    "Data",
    "Documents",
    "Files",
    "Hub",
    "Lora",
    "Member",
    "Mix",
    "Policy",
    "ReasoningGym",
    "Records",
    "Reference",
    "Reward",
    "Role",
    "Rollout",
    "check_model",
    "ends_with",
    "last_number",
    "letters_in_place",
    "scores_for",
]
