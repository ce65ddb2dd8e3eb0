"""No idle engine, no lost trajectory: rollouts as a deterministic scheduler.

``Scheduler`` (C++) is told events and answers actions; it has no clock, no thread and no I/O.
``Driver`` runs one against engines from an asyncio loop; ``ReplayBuffer`` holds what they made,
``replay`` runs a recorded trace again. Needs numpy alone; docs/rollout.md explains it.
"""
