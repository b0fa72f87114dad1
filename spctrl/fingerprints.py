"""What of the settings makes a result another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def without_neutral(settings: Mapping[str, Any], neutral: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as part of a fingerprint.

    Args:
        settings: by name.
        neutral: of settings that came later, the values under which results are as before; left out of fingerprints,
            so that earlier results stay valid.
    """
    return {name: value for name, value in settings.items() if name not in neutral or neutral[name] != value}
