"""From a configuration to a model and a task that fit each other, before anything is written."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from kimisys.trainer.checkpoint import last_checkpoint
from kimisys.trainer.config import ConfigError, RunConfig, TrainConfig
from kimisys.trainer.model_folder import (
    ModelFolder,
    check_engine,
    check_megatron,
    open_model,
    planned_model,
)
from kimisys.trainer.task import Task, TaskError, load_task


def prepare(config: RunConfig) -> tuple[ModelFolder, Task]:
    """The model that the run starts from and the task it learns.

    A model that the run makes itself is not made yet; `folder` of it is relative to the run's.
    Raises TaskError, ConfigError, LayoutError, CheckpointError, TokenizerError for what cannot run.
    """
    task = load_task(config.task)
    resumed = config.resume and last_checkpoint(config.resume.resolve() / "checkpoints")
    if resumed:
        model = open_model(resumed)
    elif config.model is not None:
        model = open_model(config.model)
    else:
        model = planned_model(Path("initial"), config.shape, task)
    check_megatron(model.hf_config, config)
    model.check_demonstrations(task.demonstrations)
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("--tensorboard needs the package: pip install kimisys[tensorboard]")
    if isinstance(config, TrainConfig):
        model.longest(task, [*task.problems, *task.held_out])
        check_engine(model.hf_config, config.engine_tensor_parallel, "--engine-tensor-parallel")
    elif not task.demonstrations:
        raise TaskError(
            f"--task {config.task} has no demonstrations, so there is nothing to imitate; give the "
            "task some, or run `kimisys train`, which can do without"
        )
    return model, task
