"""Checks of `ranks.py` in which ranks are lost, each in processes of its own; and the loss that they train by."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from attnlab import scale
from attnlab.models.skeletons.decoder import Decoder

TIMEOUT = 8.0
ALONE = ("dies", "hangs", "interrupted")  # each in processes of its own, which it may lose


def loss_of(model, ids):
    out = model(ids)
    logits = out.logits if hasattr(out, "logits") else out
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def fault(kind, lost):
    """Rank `lost` dies or hangs in the third step; every other rank learns who it is, in time."""
    model = Decoder(vocabulary=50, dim=32, depth=1, heads=4)
    parallel = scale.parallelize(model, dist.group.WORLD)
    ids = torch.randint(50, (2, 33), generator=torch.Generator().manual_seed(0))
    path = Path(os.environ["FOLDER"]) / f"{kind}.time"
    try:
        with scale.watch(dist.group.WORLD, timeout=TIMEOUT):
            for step in range(1000):
                if step == 2 and dist.get_rank() == lost:
                    path.write_text(str(time.time()))
                    if kind == "hangs":
                        time.sleep(1.2 * TIMEOUT)
                    os._exit(9)
                parallel.loss(parallel(ids), ids).backward()
                parallel.average_gradients()
    except scale.RankLost as error:
        assert error.ranks == (lost,), error
        assert f"rank {lost} lost" in str(error)
        took = time.time() - float(path.read_text())
        assert took < TIMEOUT, f"after {took:.1f} s"
    else:
        raise AssertionError("nobody was missed")


def dies(world):
    fault("dies", 0)


def hangs(world):
    fault("hangs", 2)


def interrupted(world):
    """Training goes on from the last checkpoint, in new processes, to where it would have come."""
    ids = torch.randint(50, (8, 2, 33), generator=torch.Generator().manual_seed(0))

    def new():
        torch.manual_seed(2)
        model = Decoder(vocabulary=50, dim=32, depth=1, heads=4).double()  # AdamW makes much of rounding
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    folder = Path(os.environ["FOLDER"]) / "interrupted"
    first = not (folder / "begun").exists()
    dist.barrier()
    folder.mkdir(exist_ok=True)
    (folder / "begun").touch()
    model, optimizer = new()
    parallel = scale.parallelize(model, dist.group.WORLD)
    begin = scale.resume(folder, model, optimizer)["step"]
    assert begin == (0 if first else 4)
    with scale.watch(dist.group.WORLD, timeout=TIMEOUT):
        for step in range(begin, len(ids)):
            if first and step == 5 and dist.get_rank() == 1:
                os._exit(9)
            optimizer.zero_grad()
            parallel.loss(parallel(ids[step]), ids[step]).backward()
            parallel.average_gradients()
            optimizer.step()
            if step % 2 == 1:
                scale.save(folder, step + 1, model, optimizer)
    alone, plain = new()
    for batch in ids:
        plain.zero_grad()
        loss_of(alone, batch).backward()
        plain.step()
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-8 * b.abs().max()
