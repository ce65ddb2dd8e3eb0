"""The entry point that vLLM calls in each of its processes (group ``vllm.general_plugins``)."""

from __future__ import annotations

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

BACKEND = "kimisys"
"""The name for ``weight_transfer_config={"backend": ...}``."""


def register() -> None:
    """Makes the weight-transfer backend ``kimisys`` known to vLLM. Idempotent, and cheap."""
    try:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "kimisys.adapters.vllm.weight_transfer", "KimisysWeightTransferEngine"
        )
    except ValueError:  # what the factory raises for a name that it knows
        return
