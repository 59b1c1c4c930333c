"""Data-parallel training: processes that share every batch and keep the same state."""

from cnf.distributed.group import ALONE, Group
from cnf.distributed.heartbeat import Heartbeat
from cnf.distributed.launch import join, launched, muted, speaks

__all__ = ["ALONE", "Group", "Heartbeat", "join", "launched", "muted", "speaks"]
