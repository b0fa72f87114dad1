"""What is done before Luigi is imported, which reads the settings files while it is."""

from __future__ import annotations

from pipelines import settings_files, uncaught

uncaught.install()
settings_files.check_settings_files()
