"""The library: the store, records, conditions, models, training and generation. It knows nothing of Luigi."""

__version__ = "0.1.0"
