"""Torch's own kernel with the pattern as a mask: what it keeps, and what it does where torch gives no help."""

import torch

from attnlab import attend
from attnlab.attend import pose
from attnlab.backends import dense
from attnlab.patterns import Causal, Explicit, Pattern, Window


def heads(*shape, **keywords):
    return torch.randn(*shape, dtype=torch.float64, **keywords)


class Asked(Pattern):
    """A window that counts how often it is asked."""

    count = 0

    def allows(self, b, h, q, k):
        Asked.count += 1
        return (q - k).abs() < 3


def test_a_mask_is_made_once_for_problems_alike():
    Asked.count = 0
    pattern = Asked()
    for _ in range(3):
        attend(*(heads(2, 3, 20, 4) for _ in range(3)), pattern=pattern, backend="dense")
    assert Asked.count == 1
    attend(*(heads(2, 3, 21, 4) for _ in range(3)), pattern=pattern, backend="dense")
    assert Asked.count == 2


def test_masks_too_large_to_keep_are_not_kept(monkeypatch):
    Asked.count = 0
    monkeypatch.setattr(dense, "_KEPT", 100)
    for _ in range(2):
        attend(*(heads(1, 1, 22, 4) for _ in range(3)), pattern=Asked(), backend="dense")
    assert Asked.count == 2


def test_a_pattern_of_its_own_for_each_batch_entry_and_head_is_masked_so():
    seen = torch.rand(2, 3, 10, 10) < 0.5
    q, k, v = (heads(2, 3, 10, 4) for _ in range(3))
    out = attend(q, k, v, pattern=Explicit(seen) & Causal(), backend="dense")
    for b in range(2):
        for h in range(3):
            one = attend(*(x[b : b + 1, h : h + 1] for x in (q, k, v)), pattern=Explicit(seen[b, h]) & Causal())
            torch.testing.assert_close(out[b, h], one[0, 0])


def test_half_of_the_work_is_predicted_where_torch_skips_it():
    q = torch.zeros(1, 2, 4096, 32)
    cost = {name: dense.Dense().cost(pose(q, q, q, pattern=p)) for name, p in (("full", None), ("causal", Causal()))}
    assert cost["causal"].flops == cost["full"].flops / 2


def test_memory_is_predicted_where_torch_writes_out_the_scores():
    def memory(**keywords):
        q = torch.zeros(1, 2, 1024, 32)
        return dense.Dense().cost(pose(q, q, q[..., : keywords.pop("width", 32)], **keywords)).memory

    scores = 4 * 2 * 1024**2
    assert memory() == memory(pattern=Causal()) == 0
    assert memory(pattern=Window(4)) == 5 * 1024**2
    assert min(memory(return_lse=True), memory(dropout=0.1), memory(width=16)) >= 3 * scores


def test_a_gpu_kernel_that_makes_nan_of_an_empty_row_would_be_given_another(monkeypatch):
    # On the CPU the way around is not needed; here it is walked all the same.
    pattern = Window(3) & ~Window(1)
    q, k, v = (heads(1, 2, 6, 4, requires_grad=True) for _ in range(3))
    problem = pose(q, k, v, pattern=pattern)

    class Elsewhere:
        type = "cuda"

    wanted = attend(q, k, v, pattern=pattern, backend="reference")
    seen, dead = dense._matrix(problem)
    assert dead and not seen[0].any()
    monkeypatch.setattr(dense, "_matrix", lambda p: (seen, dead))
    object.__setattr__(problem, "device", Elsewhere())
    out, _ = dense.Dense().run(problem, q, k, v)
    torch.testing.assert_close(out, wanted)
    gradient = torch.autograd.grad(out.square().sum(), q)[0]
    assert (gradient[:, :, 0] == 0).all() and gradient.isfinite().all()
