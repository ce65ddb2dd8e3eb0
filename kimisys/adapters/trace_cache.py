"""Traces kept on disk: what a framework answered once for a configuration is not asked again.

An entry is one file in $XDG_CACHE_HOME/kimisys (default: ~/.cache/kimisys). It repeats its whole
key and a checksum, so that a torn, truncated or foreign file is never taken for an answer: it is
made anew and replaced. The key holds whatever the answer depends on; `asked` adds the versions of
the frameworks and the source code that asked them.

KIMISYS_TRACE_CACHE=off turns it off. Least recently used entries go when all exceed 512 MiB.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

_log = logging.getLogger(__name__)

T = TypeVar("T")

SWITCH = "KIMISYS_TRACE_CACHE"
"""The environment variable that turns the cache off when it is "off"."""
LIMIT = 512 << 20
"""Bytes that all entries may have together."""
_MAGIC = b"kimisys trace 1\n"
_PACKAGE = Path(__file__).parent.parent


def folder() -> Path | None:
    """Where entries are; None when the cache is off, or there is no place for it."""
    if os.environ.get(SWITCH, "").lower() == "off":
        return None
    base = os.environ.get("XDG_CACHE_HOME") or ""
    # The specification says to ignore a relative path.
    try:
        root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError as error:  # a user without a home, as in some containers
        _log.warning("traces are not kept (%s): set XDG_CACHE_HOME to a folder of yours", error)
        return None
    return root / "kimisys"


def asked(packages: Sequence[str], rooms: Sequence[str]) -> dict[str, Any]:
    """The part of a key that says who was asked, and by which code.

    packages: distributions by name, whose versions matter.
    rooms: folders or files of kimisys, relative to the package, whose code matters, beside that
    of layouts (the compiled core too).
    """
    digest = hashlib.sha256()
    core = [file.name for file in _PACKAGE.glob("_core.*")]
    for room in sorted({*core, "reshard", "adapters/trace_cache.py", *rooms}):
        path = _PACKAGE / room
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(_PACKAGE)}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    versions = {name: version(name) for name in (*packages, "torch")}
    return {"versions": versions, "code": digest.hexdigest()}


def cached(
    kind: str,
    key: Mapping[str, Any],
    make: Callable[[], T],
    to_bytes: Callable[[T], bytes],
    from_bytes: Callable[[bytes], T],
) -> T:
    """What `make` returns, or what it returned before for the same key.

    kind: a word that starts the file's name. key: of what Python reads out of JSON, Infinity
    included; the same for the same answer.
    to_bytes, from_bytes: the answer's serialised form. A file that `from_bytes` refuses, with
    whatever error, is made anew.
    Raises what `make` and `to_bytes` raise. A folder that cannot be used costs time only.
    """
    where = folder()
    if where is None:
        return make()
    named = json.dumps(key, sort_keys=True, separators=(",", ":")).encode()
    file = where / f"{kind}-{hashlib.sha256(named).hexdigest()[:32]}"
    payload = _read(file, named)
    if payload is not None:
        try:
            return from_bytes(payload)
        except Exception as error:
            _log.warning("%s cannot be read (%s); it is made anew", file, error)
    answer = make()
    _write(file, named, to_bytes(answer))
    return answer


def _head(named: bytes, payload: bytes) -> bytes:
    """Everything before the payload. The checksum covers the key too."""
    checksum = hashlib.sha256(named + payload).digest()
    sizes = len(named).to_bytes(8, "little") + len(payload).to_bytes(8, "little")
    return _MAGIC + checksum + sizes + named


def _read(file: Path, named: bytes) -> bytes | None:
    """The payload of an entry that is whole and has this key; None for any other."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("%s cannot be read: %s", file, error)
        return None
    payload = data[len(_MAGIC) + 48 + len(named) :]
    if data[: len(data) - len(payload)] != _head(named, payload):
        _log.warning("%s is damaged or another's; it is made anew", file)
        return None
    try:
        os.utime(file)  # it was used: others go first
    except OSError as error:
        _log.info("%s cannot be touched: %s", file, error)
    return payload


def _write(file: Path, named: bytes, payload: bytes) -> None:
    """Whole or not at all: readers see the old file or the new one."""
    data = _head(named, payload) + payload
    if len(data) > LIMIT:
        _log.warning("%s would have %d bytes, more than the cache may hold", file, len(data))
        return
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(data)
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
        _trim(file.parent, keep=file)
    except OSError as error:
        _log.warning("the trace is not kept in %s: %s", file.parent, error)


def _trim(where: Path, keep: Path) -> None:
    """Removes the entries that were not used for longest, and what broken writers left."""
    entries = []
    for entry in where.iterdir():
        if entry != keep and entry.is_file():
            status = entry.stat()
            entries.append((status.st_mtime, status.st_size, entry))
    total = keep.stat().st_size + sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries):
        if total <= LIMIT:
            return
        entry.unlink(missing_ok=True)
        total -= size
