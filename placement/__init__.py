"""Where roles run: pools, the proof that they fit the cluster, and their placement groups. Importing this is cheap: no Ray."""

from rolecall.placement.groups import PlacedPool, place
from rolecall.placement.nodes import Node
from rolecall.placement.planner import Plan, fit
from rolecall.placement.pools import Pool, together

__all__ = ["Node", "PlacedPool", "Plan", "Pool", "fit", "place", "together"]
