"""vLLM's own ``LLM`` with the backend ``kimisys``, as a script: what it serves at which moment.

Arguments: a model folder, a publisher's address, the file for the answers (JSON). When it serves
version 1 it makes the file `answers.1`, and goes on when it is told so by a line on its standard
input. Nothing of kimisys is imported here: vLLM finds the backend by its entry point.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

PROMPT = [3, 1, 4, 1, 5]


def main(folder: str, address: str, answers: str) -> None:
    llm = LLM(
        folder,
        dtype="float32",
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        kv_cache_memory_bytes=16 << 20,
        weight_transfer_config={"backend": "kimisys"},
    )
    found = {"random": generate(llm)}
    llm.init_weight_transfer_engine({"init_info": {"addresses": [address]}})
    update(llm, 1)
    found["updated"] = generate(llm)
    engine = llm.collective_rpc(lambda worker: worker.weight_transfer_engine)[0]
    Path(answers).with_suffix(".1").touch()
    sys.stdin.readline()
    update(llm, 2)
    llm.reset_prefix_cache()
    found["by deltas"] = generate(llm)
    found["base"], found["changed"] = engine.status.base, engine.status.changed
    engine.status.version = 0  # so that the same version may come again
    engine._packer.pack = fail
    try:
        update(llm, 2)
    except OSError as error:
        found["update"] = str(error)
    found["broken"] = generate(llm)
    Path(answers).write_text(json.dumps(found))


def update(llm: LLM, version: int) -> None:
    llm.start_weight_update()
    llm.update_weights({"update_info": {"version": version}})
    llm.finish_weight_update()


def fail(*_: Any) -> None:
    raise OSError("no memory for packing")


def generate(llm: LLM) -> Any:
    """Token ids of a greedy sample, or class and message of the error."""
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, detokenize=False)
    try:
        (output,) = llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
    except Exception as error:
        requests = list(llm.llm_engine.output_processor.request_states)
        llm.llm_engine.abort_request(requests, internal=True)
        return [type(error).__name__, str(error)]
    return list(output.outputs[0].token_ids)


if __name__ == "__main__":
    main(*sys.argv[1:])
