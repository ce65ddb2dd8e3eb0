"""An Engine in a process of its own, driven by JSON lines over pipes, for tests.

vLLM changes the process it runs in; the tests' own stays as it is. Run as a script this file is the
child.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import kimisys.errors
from kimisys.adapters.vllm.engine import Engine, EngineConfig
from kimisys.adapters.vllm.environment import environment

START_SECONDS = 300.0
ANSWER_SECONDS = 120.0


class EngineProcess:
    """The parent's side. Calls may overlap: `begin` returns a number that `wait` waits for.

    script: the child."""

    script = __file__

    def __init__(self, folder: Path, **options: Any) -> None:
        command = [sys.executable, self.script, json.dumps({"model": str(folder), **options})]
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | environment(threads=1),
        )
        self._answers: dict[int, dict[str, Any]] = {}
        self._lines: deque[str] = deque()
        self._partial = b""
        self._calls = 0
        try:
            self.pid = int(self._wait(0, START_SECONDS))
        except BaseException:
            self._child.kill()
            self._child.wait()
            raise

    def begin(self, method: str, *arguments: Any, **options: Any) -> int:
        self._calls += 1
        request = {"id": self._calls, "method": method, "args": arguments, "options": options}
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(request).encode() + b"\n")
        self._child.stdin.flush()
        return self._calls

    def wait(self, call: int) -> Any:
        """The result of a call; raises what the engine raised."""
        return self._wait(call, ANSWER_SECONDS)

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        return self.wait(self.begin(method, *arguments, **options))

    def probe(self, token_ids: list[int], version: int | None = None) -> np.ndarray:
        return np.array(self.call("probe", token_ids, version), np.float32)

    def end(self) -> int:
        """Closes the engine, waits for its process, and returns its exit code."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.close()
        try:
            return self._child.wait(ANSWER_SECONDS)
        finally:
            self._child.kill()
            self._child.stdout.close()

    def _wait(self, call: int, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while call not in self._answers:
            answer = json.loads(self._line(deadline))
            self._answers[answer["id"]] = answer
        answer = self._answers.pop(call)
        if "error" in answer:
            kind, message = answer["error"]
            known = {"ValueError": ValueError}
            raise getattr(kimisys.errors, kind, known.get(kind, AssertionError))(message)
        return answer["result"]

    def _line(self, deadline: float) -> str:
        assert self._child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            while not self._lines:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                assert ready, "the engine process did not answer in time"
                read = os.read(self._child.stdout.fileno(), 1 << 20)
                assert read, f"the engine process ended with {self._child.wait(ANSWER_SECONDS)}"
                *whole, self._partial = (self._partial + read).split(b"\n")
                self._lines.extend(line.decode() for line in whole)
        return self._lines.popleft()


async def serve(
    options: dict[str, Any], answers: int, serving: Callable[[Engine], Any] = lambda engine: engine
) -> None:
    """The child's side: one line in, one line out, until the input ends. serving: whose methods are
    called, made of the engine."""
    engine = await Engine.start(EngineConfig(Path(options.pop("model")), **options))
    served = serving(engine)
    running: set[asyncio.Task[None]] = set()

    def answer(**fields: Any) -> None:
        os.write(answers, json.dumps(fields).encode() + b"\n")

    async def handle(request: dict[str, Any]) -> None:
        try:
            method = getattr(served, request["method"])
            result = await method(*request["args"], **request["options"])
            answer(id=request["id"], result=plain(result))
        except Exception as error:
            answer(id=request["id"], error=[type(error).__name__, str(error)])

    answer(id=0, result=os.getpid())
    while line := await asyncio.to_thread(sys.stdin.readline):
        task = asyncio.create_task(handle(json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)
    await engine.close()


def plain(value: Any) -> Any:
    """`value` in what JSON has."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list):
        return [plain(each) for each in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]


if __name__ == "__main__":
    channel = os.dup(1)
    os.dup2(2, 1)  # what vLLM prints is not an answer
    asyncio.run(serve(json.loads(sys.argv[1]), channel))
