"""Processes driven by JSON lines over pipes: a request is one line, so is its answer.

The parent's end is `Child`; the child's is `serve`. What a child prints is not an answer: its
standard output goes to standard error, which a file keeps until the child fails.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_TAIL = 3000  # characters of a failed child's output to show


class ChildError(RuntimeError):
    """A child process failed, ended or did not answer; the message ends with what it printed."""


class Child:
    """One process that runs `module` with `arguments`, a JSON object.

    environment: in addition to this process's own. descriptors: kept open in the child, under the
    same numbers.
    """

    def __init__(
        self,
        module: str,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str],
        descriptors: Sequence[int] = (),
    ) -> None:
        self.name = f"{module.rpartition('.')[2]} {arguments.get('rank', '')}".strip()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # close() closes it
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(dict(arguments))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            env={**os.environ, **environment},
            pass_fds=descriptors,
        )
        self._received = b""

    def send(self, method: str, **arguments: Any) -> None:
        """Asks; `receive` brings the answer. One call at a time."""
        assert self._process.stdin is not None
        line = json.dumps({"method": method, "arguments": arguments}).encode() + b"\n"
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ChildError(f"{self.name} has ended; {self._printed()}") from None

    def receive(self, timeout_seconds: float) -> Any:
        """The answer. Raises ChildError for a failure there, and when none comes in time."""
        deadline = time.monotonic() + timeout_seconds
        answer = json.loads(self._line(deadline))
        if "error" in answer:
            raise ChildError(f"{self.name}: {answer['error']}; {self._printed()}")
        return answer["result"]

    def call(self, method: str, timeout_seconds: float = 120.0, **arguments: Any) -> Any:
        """Asks and waits."""
        self.send(method, **arguments)
        return self.receive(timeout_seconds)

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Ends the process: kindly, by the end of its input, then by force. Idempotent."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout_seconds)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            pass
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
            self._output.close()

    def _line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._received:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise ChildError(f"{self.name} did not answer in time; {self._printed()}")
                read = os.read(self._process.stdout.fileno(), 1 << 20)
                if not read:
                    raise ChildError(f"{self.name} has ended; {self._printed()}")
                self._received += read
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _printed(self) -> str:
        self._output.seek(0)
        return f"it printed:\n{self._output.read().decode(errors='replace')[-_TAIL:]}"


def serve(start: Callable[..., Any]) -> None:
    """The child's side: `start(**arguments)` makes an object whose methods answer the requests.

    The first answer is None, when it has started. At the end of the input its `close` is called.
    """
    channel = os.dup(1)
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        os.write(channel, json.dumps(fields).encode() + b"\n")

    served = start(**json.loads(sys.argv[1]))
    answer(result=None)
    try:
        while line := sys.stdin.readline():
            request = json.loads(line)
            try:
                answer(result=getattr(served, request["method"])(**request["arguments"]))
            except Exception as error:
                answer(error=f"{type(error).__name__}: {error}")
                raise  # its trace goes to the output, and a half-done call cannot be gone on from
    finally:
        served.close()
