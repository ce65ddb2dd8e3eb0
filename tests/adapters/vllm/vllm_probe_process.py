"""vLLM's own ``LLM``, updated by the backend ``kimisys``, beside one that loads the same from disk.

As a script. Arguments: JSON with "before" and "after" (folders of checkpoints), "address" (of a
publisher of "after" as version 1), "tensor_parallel", "expert_parallel", "stale" (whether to update
once before with what attention layers derive left as it is), "answers" (the file for log-probs).
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from vllm import LLM, SamplingParams

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 28, 0, 17, 11]


def engine(folder: str, tensor_parallel: int, expert_parallel: bool) -> LLM:
    return LLM(
        folder,
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        tensor_parallel_size=tensor_parallel,
        enable_expert_parallel=expert_parallel,
        max_model_len=64,
        max_num_seqs=4,
        enable_prefix_caching=False,
        logprobs_mode="raw_logprobs",
        max_logprobs=-1,
        kv_cache_memory_bytes=16 << 20,
        weight_transfer_config={"backend": "kimisys"},  # type: ignore[arg-type]
    )


def probe(llm: LLM) -> np.ndarray:
    """Log-probabilities of every token at every place but the first: float32[tokens - 1, vocab];
    then those of sixteen greedy steps, which decode: float32[16, vocab]."""
    params = SamplingParams(
        max_tokens=16, temperature=0.0, ignore_eos=True, prompt_logprobs=-1, logprobs=-1,
        detokenize=False,
    )  # fmt: skip
    (output,) = llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
    assert output.prompt_logprobs is not None
    rows = [*output.prompt_logprobs[1:], *(output.outputs[0].logprobs or ())]
    return np.array([[row[i].logprob for i in sorted(row)] for row in rows if row], np.float32)


def update(llm: LLM) -> None:
    llm.start_weight_update()
    llm.update_weights({"update_info": {"version": 1}})
    llm.finish_weight_update()


def main(case: dict[str, Any]) -> None:
    found: dict[str, np.ndarray] = {}
    for folder in ("after", "before"):
        llm = engine(case[folder], case["tensor_parallel"], case["expert_parallel"])
        found[folder], found[f"{folder} again"] = probe(llm), probe(llm)
        if folder == "after":
            llm.llm_engine.engine_core.shutdown()
            del llm
    llm.init_weight_transfer_engine({"init_info": {"addresses": [case["address"]]}})
    if case["stale"]:
        llm.collective_rpc(own_copies)
        llm.collective_rpc(leave_attention)
        update(llm)
        found["stale"] = probe(llm)
        llm.collective_rpc(forget)
    update(llm)
    found["updated"] = probe(llm)
    names = llm.collective_rpc(derived)
    np.savez(case["answers"], **found, derived=np.array(json.dumps(names)))


def derived(worker: Any) -> list[str]:
    names: list[str] = worker.weight_transfer_engine._packer.derived
    return names


def own_copies(worker: Any) -> None:
    """Loaded first and in the model's dtype, what MLA absorbs are views of `kv_b_proj`; copies, as
    they are after vLLM's own reload and on other kernels, go stale when it is written to."""
    for module in worker.model_runner.model.modules():
        for name in ("W_UK_T", "W_UV"):
            if hasattr(module, name):
                copy = getattr(module, name).detach().clone()
                setattr(module, name, torch.nn.Parameter(copy, requires_grad=False))


def leave_attention(worker: Any) -> None:
    """What MLA absorbs is not derived again."""
    packer = worker.weight_transfer_engine._packer
    packer._left, packer._attention = packer._attention, []


def forget(worker: Any) -> None:
    """So that the same version may come again, and be packed whole."""
    transfer = worker.weight_transfer_engine
    transfer._packer._attention = transfer._packer._left
    transfer._behind = type(transfer._behind)()
    transfer.status.version = None


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
