"""What all stages share: fingerprints, records, models, the form of their tables, their status."""
