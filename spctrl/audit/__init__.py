"""The audit of built pose datasets: what a manifest holds, what was rejected, what leaks between splits."""

from spctrl.audit.counts import audit_split
from spctrl.audit.leakage import find_leakage
from spctrl.audit.tables import SplitTables

__all__ = ["SplitTables", "audit_split", "find_leakage"]
