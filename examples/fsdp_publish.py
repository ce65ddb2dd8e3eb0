"""Two FSDP2 ranks train and publish every step; a plain torch module follows them, shard to shard.

    python examples/fsdp_publish.py

What guards a module that has no shadow: `pull` writes into the parameters that it serves with. A
delta is verified before anything is written, a full pull only afterwards. While a pull runs, and
after one that failed, `Subscriber.version` is None: the hook below refuses to compute then, and the
next pull brings everything. Whoever computes in another thread needs a lock around both.
"""

import multiprocessing
import os
import tempfile
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard

from kimisys.adapters.dtensor.layout import dtensor_buffers, dtensor_layout
from kimisys.broadcast import Publisher, Subscriber, connect, snapshot_layout
from kimisys.reshard import Layout

STEPS, RANKS, SECONDS = 4, 2, 120.0


def build(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Embedding(1000, 64), torch.nn.Linear(64, 33), torch.nn.Linear(33, 5)
    )


def train(rank: int, folder: Path, step_ends: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    model = fully_shard(build(seed=0), mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    live: list[Any] = [None] * RANKS
    dist.all_gather_object(live, dtensor_layout(model, rank).to_json())
    whole = Layout.merge([Layout.from_json(each) for each in live])
    snapshot = snapshot_layout(whole, None)
    with Publisher(whole, snapshot, rank, folder / f"rank{rank}") as publisher:
        for step in range(STEPS):
            optimizer.zero_grad()
            tokens = torch.arange(8) + 8 * (RANKS * step + rank)  # few rows of the embedding change
            model(tokens).square().mean().backward()
            optimizer.step()
            publisher.publish(step + 1, dtensor_buffers(model, rank))
            expected = {n: p.full_tensor() for n, p in model.state_dict().items()}
            if rank == 0:
                save_file(expected, folder / f"step{step + 1}.safetensors")
            step_ends.wait(SECONDS)  # the follower pulls what there is,
            step_ends.wait(SECONDS)  # and has looked: only this example's check needs that
    dist.destroy_process_group()


def follow(folder: Path, step_ends: Any) -> None:
    module = build(seed=1)
    step_ends.wait(SECONDS)
    with connect([folder / f"rank{rank}" for rank in range(RANKS)]) as peers:
        subscriber = Subscriber(peers, dtensor_layout(module, 0), rank=0)

        def refuse_what_is_not_verified(*_: Any) -> None:
            if subscriber.version is None:
                raise RuntimeError("the module holds no whole version; pull one first")

        module.register_forward_pre_hook(refuse_what_is_not_verified)
        for step in range(STEPS):
            pulled = subscriber.pull(None, dtensor_buffers(module, 0))  # the newest that all have
            expected = load_file(folder / f"step{step + 1}.safetensors")
            same = all(torch.equal(expected[n], p) for n, p in module.state_dict().items())
            print(
                f"version {pulled.version} from {pulled.base}: read {pulled.wire_nbytes:,} of "
                f"{pulled.full_nbytes:,} bytes; {'equal to the bit' if same else 'DIFFERENT'}"
            )
            assert same and pulled.version == step + 1
            module(torch.arange(8))
            step_ends.wait(SECONDS)
            if step + 1 < STEPS:
                step_ends.wait(SECONDS)


def main() -> None:
    context = multiprocessing.get_context("spawn")
    step_ends = context.Barrier(RANKS + 1)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=train, args=(rank, Path(folder), step_ends), daemon=True)
            for rank in range(RANKS)
        ]
        for rank in ranks:
            rank.start()
        try:
            follow(Path(folder), step_ends)
        except BrokenBarrierError:
            raise SystemExit("a rank has ended or did not come in time") from None
        finally:
            for rank in ranks:
                rank.join(SECONDS)
                rank.kill()


if __name__ == "__main__":
    main()
