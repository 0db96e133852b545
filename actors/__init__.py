"""The Ray shell around roles: groups, calls, runs."""

from rolecall.actors.evaluation import Evaluation
from rolecall.actors.group import Group
from rolecall.actors.launch import launch
from rolecall.actors.packing import pack, weigh
from rolecall.actors.pending import Pending, gather
from rolecall.actors.run import Run, RunArgs
from rolecall.actors.spawn import spawn

__all__ = ["Evaluation", "Group", "Pending", "Run", "RunArgs", "gather", "launch", "pack", "spawn", "weigh"]
