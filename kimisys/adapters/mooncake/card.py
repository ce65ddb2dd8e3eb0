"""The card of an export: all that a reader on another host must know of a publisher's memory.

A JSON file of mode 0600 that the publisher writes; how it gets to the reader (a shared folder, a
copy by scp) is the user's. It holds no weights, but who has it knows where to read them.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimisys.broadcast.wire import Manifest
from kimisys.errors import SnapshotError

PROTOCOL = 1
_LIMIT = 1 << 30  # bytes, like that of a manifest


@dataclass(frozen=True)
class Card:
    """Where an export is.

    Attributes:
        session: host and port of the publisher's transfer engine.
        address: of the memory, in the publisher's address space.
        nbytes: of the whole memory.
        manifest: what lies in it.
    """

    session: str
    address: int
    nbytes: int
    manifest: Manifest

    def write(self, path: Path) -> None:
        """Writes or replaces the file, as a whole. Raises SnapshotError."""
        fields = {
            "protocol": PROTOCOL,
            "session": self.session,
            "address": self.address,
            "nbytes": self.nbytes,
            "manifest": json.loads(self.manifest.encode()),
        }
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with os.fdopen(os.open(draft, flags, 0o600), "w") as file:
                json.dump(fields, file)
            os.rename(draft, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise SnapshotError(
                f"cannot write the card {path}: {error.strerror}; choose a folder of your own"
            ) from error

    @staticmethod
    def read(path: Path) -> Card:
        """Raises SnapshotError, naming the file, for anything but a card."""
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                text = file.read(_LIMIT + 1)
            if status.st_mode & 0o022 or status.st_uid not in (0, os.geteuid()):
                raise ValueError("others may have written it; give it mode 0600 and your user")
            if len(text) > _LIMIT:
                raise ValueError(f"it has more than {_LIMIT} bytes")
            fields: Any = json.loads(text)
            if fields["protocol"] != PROTOCOL:
                raise ValueError(
                    f"it is of protocol {fields['protocol']}, this side reads {PROTOCOL}"
                )
            session, address, nbytes = fields["session"], fields["address"], fields["nbytes"]
            if type(session) is not str or type(address) is not int or type(nbytes) is not int:
                raise TypeError("a field has the wrong type")
            if address < 0 or nbytes < 0 or address + nbytes >= 1 << 63:
                raise ValueError("no memory has that address and size")
            manifest = Manifest.decode(json.dumps(fields["manifest"]).encode())
        except OSError as error:
            raise SnapshotError(
                f"cannot read the card {path}: {error.strerror}; the publisher writes it when it "
                "exports, and removes it when it ends"
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SnapshotError(f"the card {path} is malformed: {error!r}") from error
        except SnapshotError as error:
            raise SnapshotError(f"the card {path}: {error}") from error
        return Card(session, address, nbytes, manifest)
