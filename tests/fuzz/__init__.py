"""Coverage-guided fuzzing of everything that reads untrusted files: ``python tests/fuzz --help``."""
