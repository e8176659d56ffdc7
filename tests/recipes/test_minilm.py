"""MiniLM: relations, their divergence, capture of the last attention, and the training of students."""

from __future__ import annotations

import math

import pytest
import torch

from attnlab import build
from attnlab.models.language.bert import Bert
from attnlab.recipes.minilm import (
    Heads,
    distil,
    distil_through,
    last_attention,
    minilm_losses,
    needs_assistant,
    warm_then_decay,
)

LENGTHS = (7, 4, 9)


def heads(dim: int, seed: int) -> Heads:
    generator = torch.Generator().manual_seed(seed)
    return Heads(*torch.randn(3, 3, 2, 9, dim, generator=generator, dtype=torch.float64))


def padding() -> torch.Tensor:
    return torch.arange(9) < torch.tensor(LENGTHS)[:, None]


def bert(dim: int, depth: int, seed: int = 0) -> Bert:
    torch.manual_seed(seed)
    return Bert(vocabulary=30, dim=dim, depth=depth, heads=2, length=16, output="tokens", dropout=0.0).eval()


def naive(teacher: Heads, student: Heads, pair: str) -> float:
    """Text by text, cropped to its length, head by head, row by row, with exponentials and logs written out."""
    total = 0.0
    for b, n in enumerate(LENGTHS):
        here = 0.0
        for a in range(2):
            rows = []
            for side in (teacher, student):
                left, right = (getattr(side, name)[b, a, :n] for name in pair)
                weights = torch.exp(left @ right.T / math.sqrt(left.shape[1]))
                rows.append(weights / weights.sum(1, keepdim=True))
            here += float((rows[0] * torch.log(rows[0] / rows[1])).sum())
        total += here / (2 * n)
    return total / len(LENGTHS)


@pytest.mark.parametrize("pair", ["qk", "vv"])
def test_loss_equals_the_equations_written_out(pair):
    teacher, student = heads(6, 0), heads(4, 1)
    loss = minilm_losses(teacher, student, keep=padding(), relations={pair: 1.0})[pair]
    assert loss.item() == pytest.approx(naive(teacher, student, pair), rel=1e-12)


def test_divergence_is_of_the_student_from_the_teacher_as_torch_counts_it():
    teacher, student = heads(6, 0), heads(4, 1)
    both = [(side.q @ side.k.mT / side.q.shape[-1] ** 0.5).softmax(-1) for side in (teacher, student)]
    wanted = torch.nn.functional.kl_div(both[1].log(), both[0], reduction="sum") / (2 * 9 * 3)
    assert minilm_losses(teacher, student)["qk"].item() == pytest.approx(wanted.item(), rel=1e-12)
    assert minilm_losses(student, teacher)["qk"].item() != pytest.approx(wanted.item(), rel=1e-3)


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient():
    teacher = heads(6, 0)
    student = Heads(*(t.clone().requires_grad_() for t in teacher))
    losses = minilm_losses(teacher, student, keep=padding())
    assert all(loss.abs() < 1e-14 for loss in losses.values())
    sum(losses.values()).backward()
    assert max(t.grad.abs().max() for t in student) < 1e-14


@pytest.mark.parametrize("seed", range(5))
def test_loss_is_never_negative(seed):
    assert all(loss >= 0 for loss in minilm_losses(heads(6, seed), heads(4, seed + 50), keep=padding()).values())


def test_padding_changes_nothing_in_the_whole_model():
    teacher, student = bert(24, 3), bert(16, 2, 1)
    keep = padding()
    ids = torch.randint(1, 30, (3, 9))
    found = []
    for filler in (0, 7):
        text = ids.where(keep, filler)
        sides = [last_attention(model, ids=text, keep=keep) for model in (teacher, student)]
        found.append(torch.stack(list(minilm_losses(*sides, keep=keep).values())))
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


def test_last_attention_is_what_the_last_layer_mixes_with():
    model, ids = bert(24, 3), torch.randint(0, 30, (2, 9))
    inside = []
    model.blocks[-1].mixer.register_forward_hook(lambda module, args, out: inside.append((args[0], out)))
    q, k, v = last_attention(model, ids)
    mixer, (x, out) = model.blocks[-1].mixer, inside[0]
    torch.testing.assert_close(mixer.merge((q @ k.mT / 12**0.5).softmax(-1) @ v), out, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((q @ k.mT / 12**0.5).softmax(-1), mixer.weights(x), rtol=1e-4, atol=1e-6)


def test_causal_decoders_distil_too():
    options = dict(vocabulary=30, depth=1, hidden=16)
    teacher = build("llama", dim=32, heads=4, kv_heads=2, **options)
    student = build("llama", dim=16, heads=4, kv_heads=4, **options)
    history = distil(teacher, student, [{"ids": torch.randint(0, 30, (4, 12))}] * 12, rate=1e-2)
    assert history[-1] < 0.8 * history[0]
    with pytest.raises(ValueError, match="causal"):
        distil(teacher, bert(16, 1), [])


def test_an_assistant_stands_between_a_large_teacher_and_a_small_student():
    teacher, assistant, student = bert(32, 4), bert(16, 4, 1), bert(16, 2, 2)
    assert needs_assistant(teacher, student)
    assert not needs_assistant(teacher, assistant) and not needs_assistant(assistant, student)
    # Attention as sharp as training makes it: at its first weights it is nearly uniform, and any student's too.
    torch.nn.init.normal_(teacher.blocks[-1].mixer.wqkv.weight, std=0.3)
    before = [p.clone() for p in teacher.parameters()]
    ids = torch.randint(0, 30, (8, 12))
    histories = distil_through([teacher, assistant, student], lambda: [{"ids": ids}] * 25, rate=5e-3)
    assert [len(h) for h in histories] == [25, 25]
    assert all(h[-1] < 0.7 * h[0] for h in histories)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_relation_heads_regroup_the_channels_of_layers_with_other_heads():
    teacher, student = heads(6, 0), heads(4, 1)
    split = Heads(*(t.transpose(1, 2).reshape(3, 9, 4, -1).transpose(1, 2) for t in student))
    whole = minilm_losses(teacher, student, relations={"qq": 1.0})
    again = minilm_losses(teacher, split, relations={"qq": 1.0}, heads=2)
    torch.testing.assert_close(whole["qq"], again["qq"])


def test_the_rate_rises_and_falls_linearly():
    rate = warm_then_decay(5e-4, 100, warm_up=10)
    assert [rate(s) for s in (0, 4, 9, 55, 100)] == pytest.approx([5e-5, 2.5e-4, 5e-4, 2.5e-4, 0.0])


@pytest.mark.parametrize(
    ("name", "millions", "encoder"),
    # With the pooler, and the blocks alone, in millions: transformers' BertModel.
    [("bert_base", 109.48, 85.05), ("minilm_6x768", 66.96, 42.53), ("minilm_12x384", 33.36, 21.29),
     ("minilm_6x384", 22.71, 10.65), ("minilm_4x384", 19.16, 7.10), ("minilm_3x384", 17.39, 5.32)],
)  # fmt: skip
def test_students_have_the_published_sizes(name, millions, encoder):
    with torch.device("meta"):
        model = build(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert sum(p.numel() for p in model.blocks.parameters()) / 1e6 == pytest.approx(encoder, abs=0.005)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="equally many heads"):
        minilm_losses(heads(6, 0), Heads(*torch.randn(3, 3, 3, 9, 4)))
    with pytest.raises(ValueError, match="same texts"):
        minilm_losses(heads(6, 0), Heads(*torch.randn(3, 3, 2, 8, 4)))
    with pytest.raises(ValueError, match="keep"):
        minilm_losses(heads(6, 0), heads(4, 0), keep=torch.ones(3, 8))
    with pytest.raises(ValueError, match="pairs out of q, k, v"):
        minilm_losses(heads(6, 0), heads(4, 0), relations={"qo": 1.0})
    with pytest.raises(ValueError, match="heads must divide"):
        minilm_losses(heads(6, 0), heads(4, 0), heads=5)
    with pytest.raises(ValueError, match="no MultiHead"):
        last_attention(torch.nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="length = 16"):
        bert(16, 1)(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="output"):
        Bert(output="pool")
    with pytest.raises(ValueError, match="warm_up"):
        warm_then_decay(1.0, 5, warm_up=5)
    with pytest.raises(ValueError, match="at least a teacher"):
        distil_through([bert(16, 1)], list)
