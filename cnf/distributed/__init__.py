"""Many processes, one run: each takes its rows of every batch, and all know the same afterwards."""

from cnf.distributed.group import ALONE, Group
from cnf.distributed.heartbeat import Heartbeat
from cnf.distributed.launch import join, launched, muted, speaks

__all__ = ["ALONE", "Group", "Heartbeat", "join", "launched", "muted", "speaks"]
