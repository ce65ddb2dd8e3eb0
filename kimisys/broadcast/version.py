"""What a version may be."""

from __future__ import annotations

import operator

from kimisys.errors import VersionError


def checked_version(version: object) -> int:
    """The version as an integer. Raises VersionError unless it is one, in [0, 2^63)."""
    try:
        number = operator.index(version)  # type: ignore[arg-type]
    except TypeError:
        raise VersionError(f"version {version!r} is not an integer") from None
    if not 0 <= number < 1 << 63:
        raise VersionError(f"version {number} is not in [0, 2^63)")
    return number
