"""`stratakv up`: the whole system on one machine, under one supervisor."""

from stratakv.up.ports import PortChoice
from stratakv.up.supervisor import Supervisor

__all__ = ["PortChoice", "Supervisor"]
