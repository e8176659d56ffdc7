"""Train a small language model over ranks: `torchrun --nproc-per-node 4 -m attnlab scale --length 4096`.

gloo on CPUs, NCCL on GPUs. Prints the loss, what each rank sent, and how fast it went; resumes where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from attnlab import scale
from attnlab.models.skeletons.decoder import Decoder


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="torchrun -m attnlab scale", description=__doc__)
    parser.add_argument(
        "--mixer", default="multihead", help="mechanisms by name, one for each layer: kda,kda,multihead"
    )
    parser.add_argument("--method", default="ring", choices=("ring", "allgather", "ulysses"))
    parser.add_argument("--layout", default="auto", choices=("auto", "zigzag", "contiguous"))
    parser.add_argument("--length", type=int, default=4096, help="tokens of a text, over all context ranks")
    parser.add_argument("--data", type=int, default=1, help="ranks over texts; the others share a text")
    parser.add_argument("--batch", type=int, default=1, help="texts per step and data rank")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--fsdp", action="store_true", help="shard the weights too, over all ranks")
    parser.add_argument("--checkpoint", default="", help="folder; a run that is started again goes on from there")
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds after which a rank that is behind is lost")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> float:
    """The last loss."""
    args = arguments(given)
    if "RANK" not in os.environ:
        raise SystemExit("start it with torchrun: torchrun --nproc-per-node 4 -m attnlab scale")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % args.data:
        raise SystemExit(f"--data must divide the {world} ranks, got {args.data}")
    mesh = init_device_mesh(kind, (args.data, world // args.data), mesh_dim_names=("data", "context"))
    everyone = mesh["data", "context"]._flatten("all")
    torch.manual_seed(0)
    model = Decoder(
        vocabulary=256, dim=args.dim, depth=args.depth, heads=args.heads, mixer=args.mixer.split(",")
    ).to(kind)  # fmt: skip
    if args.fsdp:
        from torch.distributed.fsdp import fully_shard

        for part in (*model.blocks, model):
            fully_shard(part, mesh=everyone)
    parallel = scale.parallelize(model, mesh["context"], method=args.method, layout=args.layout)
    run = (
        parallel
        if args.fsdp
        else torch.nn.parallel.DistributedDataParallel(parallel, process_group=everyone.get_group())
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    begin = scale.resume(args.checkpoint, model, optimizer)["step"] if args.checkpoint else 0
    texts = torch.Generator().manual_seed(mesh["data"].get_local_rank())
    traffic, total = scale.traffic(mesh["context"]), float("nan")
    with scale.watch(mesh["context"], timeout=args.timeout):
        for step in range(args.steps):
            ids = _text(args.batch, args.length, texts).to(kind)
            if step < begin:
                continue
            traffic.clear()
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = parallel.loss(run(ids), ids)
            loss.backward()
            optimizer.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            total, seconds = float(mean) / world, time.perf_counter() - start
            if rank == 0:
                speed = args.batch * args.data * args.length / seconds
                print(f"step {step:3d}  loss {total:.4f}  {speed:9,.0f} tokens/s  rank 0 sent: {traffic}", flush=True)
            if args.checkpoint and (step + 1) % args.every == 0:
                scale.save(args.checkpoint, step + 1, model, optimizer)
    dist.barrier()
    dist.destroy_process_group()
    return total


def _text(batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Texts whose second half says the first again: only who looks back that far can know it."""
    half = torch.randint(256, (batch, -(-length // 2)), generator=generator)
    return torch.cat([half, half], 1)[:, :length]


if __name__ == "__main__":
    main()
