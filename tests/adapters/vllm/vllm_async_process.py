"""vLLM's own AsyncLLM with the backend ``kimisys``, driven by JSON lines over pipes, for tests.

Run as a script this file is the child. Argument: the AsyncEngineArgs, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from kimisys.adapters.vllm import environment


class Server:
    def __init__(self, options: dict[str, Any]) -> None:
        environment.apply(options["tensor_parallel_size"])  # which cores are whose
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))
        self._calls = 0

    async def connect(self, addresses: list[str]) -> None:
        request = WeightTransferInitRequest(init_info={"addresses": addresses})
        await self._llm.init_weight_transfer_engine(request)

    async def update(self, version: int, full: bool, keep_prefix_cache: bool) -> list[Any]:
        """Each rank's Status."""
        await self._llm.pause_generation(mode="wait", clear_cache=not keep_prefix_cache)
        await self._llm.start_weight_update()
        update = {"version": version, "full": full}
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=update))
        await self._llm.finish_weight_update(weight_version=str(version))
        await self._llm.resume_generation()
        statuses: list[Any] = await self._llm.collective_rpc("kimisys_status")
        return statuses

    async def generate(self, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        self._calls += 1
        params = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=0
        )
        final = None
        async for output in self._llm.generate(
            {"prompt_token_ids": prompt}, params, str(self._calls)
        ):
            final = output
        assert final is not None
        (found,) = final.outputs
        tokens = list(found.token_ids)
        chosen = zip(found.logprobs or [], tokens, strict=True)
        return {
            "token_ids": tokens,
            "log_probs": [at[token].logprob for at, token in chosen],
            "cached": final.num_cached_tokens,
            "versions": [[s.version, s.start, s.end] for s in found.weight_versions or []],
        }


async def serve(options: dict[str, Any], answers: int) -> None:
    server = Server(options)
    os.write(answers, json.dumps(None).encode() + b"\n")
    while line := await asyncio.to_thread(sys.stdin.readline):
        method, arguments = json.loads(line)
        answer = await getattr(server, method)(*arguments)
        os.write(answers, json.dumps(answer).encode() + b"\n")
    server._llm.shutdown()


if __name__ == "__main__":
    channel = os.dup(1)
    os.dup2(2, 1)  # what vLLM prints is not an answer
    asyncio.run(serve(json.loads(sys.argv[1]), channel))
