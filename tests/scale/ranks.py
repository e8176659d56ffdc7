"""Checks that run on real ranks: `python ranks.py FOLDER WORLD CHECK…` forks WORLD processes that talk by gloo.

Each rank leaves FOLDER/CHECK.RANK, which is empty where the check held and else says why not. Run by test_ranks.py.
"""

import copy
import itertools
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from rank_faults import ALONE, dies, hangs, interrupted, loss_of  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from attnlab import attend, scale, scan
from attnlab.arena.memory import peak
from attnlab.models.skeletons.decoder import Decoder
from attnlab.patterns import Causal, Documents, Window
from attnlab.scale import Layout
from attnlab.torchvision_schemas import declare


def same(a, b, tolerance=1e-10):
    assert a.shape == b.shape, (a.shape, b.shape)
    a, b = a.detach(), b.detach()
    error = float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
    assert error <= tolerance, f"off by {error:.1e}"


def random(*shape, seed=0):
    """The same numbers on every rank."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attention(world):
    """Attention over ranks is attention in one place: every method, forward and backward."""
    mesh, n = init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))["cp"], 37
    q, w = random(2, 4, n, 8), random(2, 4, n, 8, seed=1)
    k, v = random(2, 2, 2, n, 8, seed=2)
    me = dist.get_rank()
    for pattern in (None, Documents((20, 17)) & Causal()):
        whole = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = attend(*whole, pattern=pattern, return_lse=True, backend="reference")
        ((out * w).sum() + lse.sum()).backward()
        zigzag, blocks = Layout.zigzag(n, world), Layout.contiguous(n, world)
        for method, layout in (("ring", zigzag), ("ring", blocks), ("allgather", zigzag), ("ulysses", zigzag)):
            mine = [layout.shard(x, me).clone().requires_grad_() for x in (q, k, v)]
            o, s = scale.attend(*mine, mesh=mesh, method=method, layout=layout, pattern=pattern, return_lse=True)
            ((o * layout.shard(w, me)).sum() + s.sum()).backward()
            same(o, layout.shard(out, me))
            same(s, layout.shard(lse, me, 2))
            for a, b in zip(mine, whole, strict=True):
                same(a.grad, layout.shard(b.grad, me))


def groups(world):
    """All-to-all in groups, a ring over the groups: a mesh of two dimensions."""
    mesh, n, me = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("ring", "heads")), 37, dist.get_rank()
    q, w = random(2, 4, n, 8), random(2, 4, n, 8, seed=1)
    k, v = random(2, 2, 2, n, 8, seed=2)
    layout = Layout.zigzag(n, world)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*whole, pattern=Window(9), backend="reference")
    (out * w).sum().backward()
    mine = [layout.shard(x, me).clone().requires_grad_() for x in (q, k, v)]
    found = scale.attend(*mine, mesh=mesh, method="usp", layout=layout, pattern=Window(9))
    (found * layout.shard(w, me)).sum().backward()
    same(found, layout.shard(out, me))
    for a, b in zip(mine, whole, strict=True):
        same(a.grad, layout.shard(b.grad, me))


def scans(world):
    """LASP-2 over ranks is the scan in one place."""
    group, n, me = dist.group.WORLD, 37, dist.get_rank()
    layout = Layout.contiguous(n, world)
    q, v = random(2, 4, n, 6), random(2, 4, n, 5, seed=1)
    k = F.normalize(random(2, 4, n, 6, seed=2), dim=-1)
    decay, beta = -random(2, 4, n, 6, seed=3).abs(), random(2, 4, n, seed=4).sigmoid()
    for given in ([q, k, v, None, None], [q, k, v, decay[..., 0], None], [q, k, v, decay, beta]):
        whole = [x if x is None else x.clone().requires_grad_() for x in given]
        out, _ = scan(*whole[:3], decay=whole[3], beta=whole[4])
        out.sin().sum().backward()
        mine = [x if x is None else layout.shard(x, me, 2).clone().requires_grad_() for x in given]
        scale.traffic(group).clear()
        o = scale.scan(*mine[:3], decay=mine[3], beta=mine[4], mesh=group, layout=layout)
        o.sin().sum().backward()
        same(o, layout.shard(out, me))
        for a, b in zip(mine, whole, strict=True):
            if a is not None:
                same(a.grad, layout.shard(b.grad, me, 2))
        assert scale.traffic(group).calls["all_gather"] == 2


def networks():
    """A hybrid of ours, and one of transformers where it is installed."""
    yield Decoder(vocabulary=50, dim=32, depth=3, heads=4, mixer=["kda", "linear", "multihead"])
    yield Decoder(vocabulary=50, dim=32, depth=1, heads=4, kv_heads=2, position="alibi")
    if "transformers" in sys.modules:
        import transformers as hf

        size = dict(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, max_position_embeddings=128,
        )  # fmt: skip
        for config in (hf.LlamaConfig(**size), hf.MistralConfig(**size, sliding_window=9)):
            yield hf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def models(world):
    """Loss and gradients of whole models are those of one process, to float32 rounding."""
    ids = torch.randint(50, (2, 33), generator=torch.Generator().manual_seed(0))
    for make, method in itertools.product(range(4), ("ring", "allgather", "ulysses")):
        torch.manual_seed(1)
        found = list(networks())
        if make >= len(found) or (method != "ring" and make > 0):
            continue
        model = found[make]
        alone = copy.deepcopy(model)
        wanted = loss_of(alone, ids)
        wanted.backward()
        parallel = scale.parallelize(model, dist.group.WORLD, method=method)
        loss = parallel.loss(parallel(ids), ids)
        loss.backward()
        parallel.average_gradients()
        same(loss, wanted, 1e-6)
        for a, b in zip(model.parameters(), alone.parameters(), strict=True):
            assert (a.grad - b.grad).abs().max() <= 2e-5 * b.grad.abs().max() + 1e-7
        parallel.close()
        same(loss_of(model, ids), wanted, 0.0)


def training(world):
    """Two dimensions, data and context: DDP and FSDP2 train to the weights of one process."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "cp"))
    everyone = mesh["dp", "cp"]._flatten("all")
    batches = torch.randint(50, (2, 4, 33), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    start = Decoder(vocabulary=50, dim=32, depth=2, heads=4, mixer=["kda", "multihead"])
    alone = copy.deepcopy(start)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for ids in batches:
        optimizer.zero_grad()
        loss = loss_of(alone, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    mine = slice(2 * mesh["dp"].get_local_rank(), 2 * mesh["dp"].get_local_rank() + 2)
    for kind in ("ddp", "fsdp before", "fsdp after"):
        model = copy.deepcopy(start)
        if kind == "fsdp before":
            for block in (*model.blocks, model):
                fully_shard(block, mesh=everyone)
        parallel = scale.parallelize(model, mesh["cp"])
        if kind == "fsdp after":
            for block in (*model.blocks, model):
                fully_shard(block, mesh=everyone)
        run = DistributedDataParallel(parallel, process_group=everyone.get_group()) if kind == "ddp" else parallel
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for ids, wanted in zip(batches, losses, strict=True):
            optimizer.zero_grad()
            loss = parallel.loss(run(ids[mine]), ids[mine])
            loss.backward()
            optimizer.step()
            whole = loss.detach().clone()
            dist.all_reduce(whole, group=mesh["dp"].get_group())
            same(whole / 2, wanted, 1e-5)
        for (name, a), b in zip(model.named_parameters(), alone.parameters(), strict=True):
            a = a.full_tensor() if hasattr(a, "full_tensor") else a
            assert (a - b).abs().max() <= 1e-5 * b.abs().max(), (kind, name)
        parallel.close()


def checkpoints(world):
    """A checkpoint of sharded weights and momenta goes on as if nothing had happened; half a checkpoint is not read."""
    folder = Path(os.environ["FOLDER"]) / "checkpoint"
    ids = torch.randint(50, (2, 33), generator=torch.Generator().manual_seed(0))

    def new():
        torch.manual_seed(2)
        model = Decoder(vocabulary=50, dim=32, depth=1, heads=4)
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        parallel = scale.parallelize(model, dist.group.WORLD)
        return parallel, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(parallel, optimizer):
        optimizer.zero_grad()
        loss = parallel.loss(parallel(ids), ids)
        loss.backward()
        optimizer.step()
        return float(loss)

    parallel, optimizer = new()
    assert scale.resume(folder, parallel.model, optimizer) == {"step": 0}
    step(parallel, optimizer)
    scale.save(folder, 1, parallel.model, optimizer, seen=torch.tensor(7))
    if dist.get_rank() == 0:
        (folder / "step-00000009").mkdir()  # what a rank left that died while it wrote
    wanted = [step(parallel, optimizer) for _ in range(2)]
    again, fresh = new()
    found = scale.resume(folder, again.model, fresh, seen=torch.tensor(0))
    assert found["step"] == 1 and int(found["seen"]) == 7
    assert [step(again, fresh) for _ in range(2)] == wanted


def counts(world):
    """What is sent is what the formulas say; and memory for activations falls as one over the ranks."""
    group, b, h, kv, d = dist.group.WORLD, 2, 4, 2, 8
    for n in (32, 128):
        shard = n // world
        q, k, v = (torch.randn(b, x, shard, d, requires_grad=True) for x in (h, kv, kv))
        traffic = scale.traffic(group)
        for method, forward, backward in (
            ("ring", 2 * kv * (world - 1), 4 * kv * (world - 1)),
            ("allgather", 2 * kv * (world - 1), 4 * kv * (world - 1)),
        ):
            traffic.clear()
            out = scale.attend(q, k, v, mesh=group, method=method)
            assert traffic.sent == 4 * b * shard * d * forward, (method, str(traffic))
            out.sum().backward()
            assert traffic.sent == 4 * b * shard * d * (forward + backward), (method, str(traffic))
        if h % world == 0:
            traffic.clear()
            repeated = max(1, world // kv)  # a key head goes to each rank that has one of its query heads
            out = scale.attend(q, k, v, mesh=group, method="ulysses")
            each = 2 * h + 2 * kv * repeated
            assert traffic.sent == 4 * b * shard * d * each * (world - 1) // world, str(traffic)
            out.sum().backward()
            assert traffic.sent == 2 * 4 * b * shard * d * each * (world - 1) // world
        traffic.clear()
        out = scale.scan(q, q, q, mesh=group)
        assert traffic.sent == 4 * b * h * d * d * (world - 1)  # whatever n
        out.sum().backward()
        assert traffic.sent == 2 * 4 * b * h * d * d * (world - 1)


def memory(world):
    """The most that a rank takes at a time falls as one over the ranks: attention in a window, and a scan."""
    n, group, me = 2**15, dist.group.WORLD, dist.get_rank()
    given = torch.randn(3, 1, 4, n, 64, generator=torch.Generator().manual_seed(0))
    layout = Layout.contiguous(n, world)
    for alone, spread in (
        (lambda q, k, v: scan(q, k, v)[0], lambda q, k, v: scale.scan(q, k, v, mesh=group, layout=layout)),
        (
            lambda q, k, v: attend(q, k, v, pattern=Window(64)),
            lambda q, k, v: scale.attend(q, k, v, mesh=group, layout=layout, pattern=Window(64)),
        ),
    ):

        def taken(call, parts):
            parts = [x.clone().requires_grad_() for x in parts]
            return peak(lambda: call(*parts).sum().backward(), "cpu")

        small = [x[:, :, :1024] for x in given]
        taken(alone, small), taken(spread, [layout.shard(x, me) for x in given])  # what is made once
        mine = taken(spread, [layout.shard(x, me) for x in given])
        whole = taken(alone, given) if me == 0 else None
        if whole and mine:
            assert mine < 1.6 * whole / world, f"{mine / whole:.2f} of {whole / 2**20:.0f} MiB"
        dist.barrier()


def refusals(world):
    """What does not fit is said before anything large is sent."""
    group, me = dist.group.WORLD, dist.get_rank()
    traffic = scale.traffic(group)
    traffic.clear()

    def refused(kind, word, call):
        try:
            call()
        except kind as error:
            assert word in str(error), error
        else:
            raise AssertionError(f"{word}: no error")
        assert traffic.sent == 0

    def some(n=8, h=world, dtype=torch.float32):
        return [torch.zeros(1, h, n, 8, dtype=dtype)] * 3

    refused(ValueError, "equally many", lambda: scale.attend(*some(8 + me), mesh=group))
    refused(
        TypeError, "one dtype", lambda: scale.attend(*some(dtype=torch.float64 if me else torch.float32), mesh=group)
    )
    refused(ValueError, f"{world} ranks", lambda: scale.attend(*some(h=world + 1), mesh=group, method="ulysses"))
    refused(ValueError, "one shape", lambda: scale.scan(*some(h=1 + me), mesh=group))
    refused(ValueError, "same", lambda: scale.attend(*some(), mesh=group, pattern=Window(2 + me)))
    small = Decoder(vocabulary=50, dim=30, depth=1, heads=5)
    refused(ValueError, "heads", lambda: scale.parallelize(small, group, method="ulysses"))
    mamba = Decoder(vocabulary=50, dim=32, depth=2, heads=4, mixer=["mamba", "multihead"])
    traffic.clear()
    try:
        scale.parallelize(mamba, group)
    except ValueError as error:
        assert "mixes tokens" in str(error)
    else:
        raise AssertionError("a selective scan is not spread")


def start(rank, world, folder, names, port):
    torch.set_num_threads(1)
    os.environ.update(FOLDER=str(folder))
    # As under torchrun, the store is not a rank's own.
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for name in names:
        try:
            if name in ALONE:
                globals()[name](world)
            else:
                with scale.watch(timeout=40):
                    globals()[name](world)
            said = ""
        except BaseException:
            said = traceback.format_exc()
        (folder / f"{name}.{rank}").write_text(said)
        if said or name in ALONE:
            os._exit(bool(said))  # the others may wait for ever
        dist.barrier()
    dist.destroy_process_group()


def launch(folder, world, names):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = (world, Path(folder), names, store.port)
    context = mp.start_processes(start, given, nprocs=world, join=False, start_method="fork")
    for process in context.processes:
        process.join()


def main(folder, world, *names):
    declare()
    if "models" in names:
        try:
            import transformers

            for name in ("AutoModelForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"):
                getattr(transformers, name)  # imported once, before the processes part
        except ImportError:
            pass
    together = [name for name in names if name not in ALONE]
    if together:
        launch(folder, int(world), together)
    for name in names:
        if name in ALONE:
            launch(folder, int(world), [name])
            if name == "interrupted":
                launch(folder, int(world), [name])


if __name__ == "__main__":
    main(*sys.argv[1:])
