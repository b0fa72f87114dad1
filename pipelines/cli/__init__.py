"""The commands of ``spctrl``."""
