"""A task's embedding, mixed in at the last token, does what its examples do; and touches nothing else."""

import pytest
import torch
from torch import nn

from attnlab.lens.circuits.injection import SoftInjection, Task, mixed_in, task_embedding, train_injection
from attnlab.lens.steer import steer
from attnlab.lens.toys import permutations
from attnlab.lens.watch import watch
from attnlab.models.skeletons.decoder import Decoder

IDS = torch.arange(14).view(2, 7) % 11


def decoder() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(vocabulary=11, dim=24, depth=3, heads=4, kv_heads=2, hidden=32).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def test_one_mixture_for_all_tasks_replaces_their_examples_and_random_embeddings_do_not(permuting) -> None:
    found = [task_embedding(permuting, permutations.batch(50, task=k, seed=k).ids) for k in range(8)]
    rng = torch.Generator().manual_seed(0)
    random = [torch.randn(e.shape, generator=rng) * e.std() for e in found]

    def accuracy(embeddings: list[torch.Tensor]) -> float:
        tasks = []
        for k in range(4):  # learned on four of the tasks, asked of all eight
            bare = permutations.batch(60, shots=0, task=k, seed=10 + k)
            tasks.append(Task(embeddings[k], bare.ids, bare.answers, validation=20))
        injection = train_injection(permuting, tasks, steps=150)
        right = []
        for k in range(8):
            prompts = permutations.batch(100, shots=0, task=k, seed=20 + k)
            with steer(permuting, injection.edit(embedding=embeddings[k])):
                right.append(permutations.accuracy(permuting, prompts))
        return sum(right) / 8

    none, few = (permutations.accuracy(permuting, permutations.batch(400, shots=n, seed=3)) for n in (0, 8))
    assert none < 0.2 and few > 0.9
    assert accuracy(found) > none + 0.7 * (few - none)
    assert accuracy(random) < none + 0.3 * (few - none)


def test_an_alpha_of_zero_changes_no_bit() -> None:
    model = decoder()
    embedding = torch.full((3, 4, 6), torch.inf)
    before = model(IDS)
    with steer(model, SoftInjection(embedding, torch.zeros(3, 4)).edit()):
        assert torch.equal(model(IDS), before)


def test_an_alpha_of_one_leaves_of_the_prompt_its_last_token() -> None:
    model = decoder()
    injection = SoftInjection(torch.randn(3, 4, 6), torch.ones(3, 4))
    other = torch.cat((IDS[:, :-1].flip(1), IDS[:, -1:]), 1)
    with steer(model, injection.edit()):
        one, two = model(IDS), model(other)
    torch.testing.assert_close(one[:, -1], two[:, -1])
    assert not torch.allclose(one[:, -2], two[:, -2])


def test_the_embedding_of_the_prompt_itself_changes_nothing() -> None:
    model = decoder()
    with torch.no_grad():
        before = model(IDS[:1])
        injection = SoftInjection(task_embedding(model, IDS[:1]), torch.rand(3, 4))
        with steer(model, injection.edit()):
            torch.testing.assert_close(model(IDS[:1]), before)


def test_an_embedding_is_the_mean_of_what_the_heads_say_last() -> None:
    model = decoder()
    with watch(model, keep="outputs") as record, torch.no_grad():
        model(IDS)
    wanted = torch.stack([record[i][:, :, -1].mean(0) for i in range(3)])
    torch.testing.assert_close(task_embedding(model, IDS), wanted)
    torch.testing.assert_close(task_embedding(model, [IDS[:1], IDS[1:]]), wanted)
    early = torch.stack([torch.stack((record[i][0, :, 2], record[i][1, :, 5])).mean(0) for i in range(3)])
    torch.testing.assert_close(task_embedding(model, IDS, last=torch.tensor([2, 5])), early)


def test_padding_on_the_right_is_passed_over() -> None:
    model = decoder()
    injection = SoftInjection(torch.randn(3, 4, 6), torch.rand(3, 4))
    with torch.no_grad(), steer(model, injection.edit()):
        wanted = model(IDS[:, :5])[:, -1]
    with torch.no_grad(), steer(model, injection.edit(last=torch.tensor([4, 4]))):
        torch.testing.assert_close(model(IDS)[:, 4], wanted)


def test_generation_is_touched_in_the_prompt_alone(transformers) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=24, n_layer=2, n_head=3, vocab_size=13, n_positions=16, initializer_range=0.3,
        pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    injection = SoftInjection(torch.randn(2, 3, 8), torch.full((2, 3), 0.7))
    with torch.no_grad():
        plain = model.generate(IDS, max_new_tokens=4, do_sample=False)
        with steer(model, injection.edit()):
            found = model.generate(IDS, max_new_tokens=4, do_sample=False)
        # By hand: the prompt's pass is edited (the bias of the projection stays), decoding goes on from its cache.
        hooks = [
            block.attn.c_proj.register_forward_pre_hook(
                lambda _, x, i=i: _mix(x[0], injection.embedding[i]) if x[0].shape[1] > 1 else None
            )
            for i, block in enumerate(model.transformer.h)
        ]
        wanted = model.generate(IDS, max_new_tokens=4, do_sample=False)
        for hook in hooks:
            hook.remove()
    assert torch.equal(found, wanted) and not torch.equal(found, plain)


def _mix(z: torch.Tensor, embedding: torch.Tensor) -> tuple[torch.Tensor]:
    z = z.clone()
    z[:, -1] = 0.3 * z[:, -1] + 0.7 * embedding.flatten()
    return (z,)


def task(**changes) -> Task:
    torch.manual_seed(0)
    ids = torch.randint(11, (12, 5))
    return Task(**{**dict(embedding=torch.randn(3, 4, 6), ids=ids, answers=ids[:, 0], validation=4), **changes})


def test_only_the_mixture_learns_and_the_model_stays_as_it_was() -> None:
    model = decoder().train()
    model.head.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    injection = train_injection(model, task(), steps=3)
    assert injection.logits.abs().min() > 0 and [n for n, _ in injection.named_parameters()] == ["logits"]
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert model.training and not model.head.weight.requires_grad and model.norm.weight.requires_grad


def test_the_best_checkpoint_on_held_out_prompts_is_kept_or_the_last_as_released() -> None:
    model, given = decoder(), task()
    runs = {n: train_injection(model, given, steps=n, every=1, select="last").logits.detach() for n in range(1, 7)}

    def held_out(logits: torch.Tensor) -> float:
        injection = SoftInjection(given.embedding)
        injection.logits.data = logits
        with torch.no_grad(), steer(model, injection.edit()):
            return nn.functional.cross_entropy(model(given.ids[-4:])[:, -1], given.answers[-4:]).item()

    best = min(runs, key=lambda n: held_out(runs[n]))
    assert torch.equal(train_injection(model, given, steps=6, every=1).logits, runs[best])


def test_one_token_alone_and_all_but_the_last_are_left_as_they_are() -> None:
    z = torch.randn(2, 4, 5, 6)
    mixed = mixed_in(z, torch.randn(4, 6), torch.full((4,), 0.5))
    assert torch.equal(mixed[:, :, :-1], z[:, :, :-1]) and not torch.equal(mixed[:, :, -1], z[:, :, -1])
    assert torch.equal(mixed_in(z[:, :, :1], torch.randn(4, 6), torch.ones(4)), z[:, :, :1])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: SoftInjection(torch.randn(3, 4)), "embedding must have shape"),
        (lambda: SoftInjection(torch.randn(3, 4, 6), torch.ones(4)), "alpha must have shape"),
        (lambda: task(answers=torch.zeros(3)), "one for each of 12"),
        (lambda: task(validation=12), "must leave some"),
        (lambda: train_injection(decoder(), []), "got none"),
        (lambda: train_injection(decoder(), task(), select="first"), "select must be"),
        (lambda: train_injection(decoder(), task(embedding=torch.randn(3, 2, 6))), "3 layers of 2 heads"),
    ],
)
def test_what_does_not_fit_is_said(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
