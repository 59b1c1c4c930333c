"""Data-parallel training: processes that share every batch and keep the same state."""

from cnf.distributed.group import SINGLE_PROCESS, Group
from cnf.distributed.heartbeat import Heartbeat
from cnf.distributed.launch import join, launched

__all__ = ["SINGLE_PROCESS", "Group", "Heartbeat", "join", "launched"]
