"""`kimisys generate`: what a model writes after given prompts."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text

from kimisys.trainer.config import ConfigError
from kimisys.trainer.engines import Sampling
from kimisys.trainer.model_folder import check_engine, open_model
from kimisys.trainer.serve_config import GenerateConfig
from kimisys.trainer.serving import VERSION, find_weights, served

DEFAULT_TOKENS = 64


def run(config: GenerateConfig, console: Console) -> None:
    """Complete each prompt and print it with its completions."""
    model = open_model(find_weights(config.folder).resolve())
    check_engine(model.hf_config, config.tensor_parallel, "--tensor-parallel")
    tokenizer = model.tokenizer
    texts = config.prompts or tuple(line.rstrip("\n") for line in sys.stdin if line.strip())
    if not texts:
        raise ConfigError("there is no prompt: give some as arguments, or a line each on stdin")
    prompts = [tokenizer.encode_prompt(text) for text in texts]
    longest = max(map(len, prompts))
    max_tokens = config.max_tokens or max(1, min(DEFAULT_TOKENS, model.context - longest))
    longest += max_tokens
    if longest > model.context:
        raise ConfigError(
            f"the longest prompt and {max_tokens} tokens take {longest}, the model has room for "
            f"{model.context}; lower --max-tokens or shorten the prompt"
        )
    serving = served(
        model, config.dtype, longest, config.tensor_parallel, config.seed, config.ready_timeout
    )
    with console.status(f"starting an engine with {model.folder}"), serving as engines:
        how = Sampling(
            config.samples,
            config.temperature,
            max_tokens,
            [tokenizer.eos_id],
            config.seed,
        )
        answers = engines.generate(prompts, how, VERSION)
    for text, group in zip(texts, answers, strict=True):
        for one in group:
            ids = list(one.token_ids)
            finished = bool(ids) and ids[-1] == tokenizer.eos_id
            line = Text(text, "dim")
            line.append(tokenizer.decode(ids[:-1] if finished else ids), "bold")
            if not finished:
                line.append(" …", "yellow")
            console.print(line, soft_wrap=True)
