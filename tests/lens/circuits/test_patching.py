"""Patching finds the heads that are known to matter, and equals what the same edits give by hand."""

import pytest
import torch
from torch import nn

from attnlab.lens.circuits.patching import activation_patching, logit_difference, path_patching
from attnlab.lens.circuits.traces import Tracer, Writer
from attnlab.lens.edits.heads import Ablate, Patch
from attnlab.lens.steer import steer
from attnlab.lens.tap import join
from attnlab.lens.toys import recall
from attnlab.lens.watch import watch
from attnlab.models.skeletons.decoder import Decoder

CLEAN = torch.arange(21).view(3, 7) % 13
CORRUPT = CLEAN.roll(1, 0)
ANSWERS = torch.tensor([[1, 5], [7, 2], [3, 11]])


def decoder(depth: int = 3, kv_heads: int = 2, **keywords) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(
        vocabulary=13, dim=24, depth=depth, heads=4, kv_heads=kv_heads, hidden=32, position="learned", length=16,
        **keywords,
    ).double().eval()  # fmt: skip
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logit_difference(logits, ANSWERS).mean()


@pytest.fixture(scope="module")
def asked() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Recall prompts, the same asked for another key, and the two answers."""
    prompts = recall.batch(128, seed=1)
    other = recall.corrupted(prompts, seed=2)
    return prompts.ids, other.ids, torch.stack((prompts.answers, other.answers), 1)


def test_the_direct_effect_on_the_logits_is_that_of_the_retrieval_heads(recalling, asked) -> None:
    effect = path_patching(recalling, *asked, receivers="blocks.1")
    assert effect[1].sum() > 0.5 and effect[1].min() > 0 and effect[0].abs().max() < 0.05


def test_retrieval_heads_hear_through_their_keys_of_previous_token_heads(recalling, asked) -> None:
    clean, _, answers = asked
    # The keys of the two values change places: what is asked for now stands before the other value.
    places = (clean[:, :, None] == answers[:, None]).double().argmax(1)
    corrupt = clean.clone()
    corrupt.scatter_(1, places - 1, clean.gather(1, places.flip(1) - 1))
    by_keys = path_patching(
        recalling, clean, corrupt, answers, receivers=[(1, h) for h in range(8)], part="k", position=None
    )
    with watch(recalling, layers=0, keep="weights") as record:
        recalling(clean)
    at = torch.arange(1, 16, 2)
    previous = record[0][:, :, at, at - 1].mean((0, 2))  # of values, on their keys
    assert by_keys[0].argmax() in previous.topk(3).indices
    assert by_keys[0].sum() > 0.5 and by_keys[1].abs().max() == 0
    by_queries = path_patching(
        recalling, clean, corrupt, answers, receivers=[(1, h) for h in range(8)], part="q", position=None
    )
    assert by_queries.abs().max() < 0.1 * by_keys.max()  # the question is the same


def test_heads_that_patching_finds_are_those_that_ablation_breaks(recalling, asked) -> None:
    clean, _, answers = asked
    effect = activation_patching(recalling, *asked)
    order = effect.flatten().argsort(descending=True).tolist()

    def left(heads: list[int]) -> float:
        edits = [Ablate("mean", layers=i // 8, heads=i % 8) for i in heads]
        with steer(recalling, edits), torch.no_grad():
            return (recalling(clean)[:, -1].argmax(-1) == answers[:, 0]).double().mean().item()

    assert left(order[:8]) < 0.2 and left(order[8:][-4:]) > left(order[:4])


def test_activation_patching_is_a_patch_of_one_head_at_a_time() -> None:
    model = decoder()
    with watch(model, keep="outputs") as other:
        model(CORRUPT)
    found = activation_patching(model, CLEAN, CORRUPT, ANSWERS, together=5)
    base, whole = difference(model(CLEAN)), difference(model(CORRUPT))
    for layer in range(3):
        for head in range(4):
            with steer(model, Patch(other, layers=layer, heads=head, queries=-1)):
                wanted = (difference(model(CLEAN)) - base) / (whole - base)
            torch.testing.assert_close(found[layer, head], wanted)


def naive(model: Decoder, receiver: tuple[int, int], part: str, sender: tuple[int, int]) -> torch.Tensor:
    """Path patching with hooks on the projections, for a model whose heads have keys of their own."""
    mixers = [block.mixer for block in model.blocks]
    rows = {"q": 0, "k": 24, "v": 48}[part] + 6 * receiver[1]
    seen: dict = {}

    def keep(name, i):
        return mixers[i].wo.register_forward_pre_hook(lambda _, x: seen.update({(name, i): x[0][:, -1].clone()}))

    for name, ids in (("clean", CLEAN), ("corrupt", CORRUPT)):
        hooks = [keep(name, i) for i in range(3)]
        model(ids)
        for hook in hooks:
            hook.remove()

    def hold(i):
        def change(_, given):
            z = given[0].clone()
            z[:, -1] = seen["clean", i]
            if i == sender[0]:
                at = slice(6 * sender[1], 6 * sender[1] + 6)
                z[:, -1, at] = seen["corrupt", i][:, at]
            return z

        return mixers[i].wo.register_forward_pre_hook(change)

    hooks = [hold(i) for i in range(3)]
    hooks.append(
        mixers[receiver[0]].wqkv.register_forward_hook(
            lambda _, __, y: seen.update(heard=y[:, -1, rows : rows + 6].clone())
        )
    )
    model(CLEAN)
    for hook in hooks:
        hook.remove()

    def put(_, __, y):
        y = y.clone()
        y[:, -1, rows : rows + 6] = seen["heard"]
        return y

    hook = mixers[receiver[0]].wqkv.register_forward_hook(put)
    patched = difference(model(CLEAN))
    hook.remove()
    base, whole = difference(model(CLEAN)), difference(model(CORRUPT))
    return (patched - base) / (whole - base)


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_path_patching_equals_hooks_written_by_hand(part: str) -> None:
    model = decoder(kv_heads=4)
    with torch.no_grad():
        found = path_patching(model, CLEAN, CORRUPT, ANSWERS, receivers=[(2, 3)], part=part, together=3)
        for layer in range(2):
            for head in range(4):
                wanted = naive(model, (2, 3), part, (layer, head))
                torch.testing.assert_close(found[layer, head], wanted)
                assert wanted != 0
    assert not found[2].any()


@pytest.mark.parametrize("part", ["k", "v"])
def test_heads_that_share_their_keys_are_receivers_of_their_own(part: str) -> None:
    model = decoder(kv_heads=2)
    same = decoder(kv_heads=4)
    state = model.state_dict()
    for i in range(3):
        name = f"blocks.{i}.mixer.wqkv.weight"
        q, k, v = state[name].split([24, 12, 12])
        k, v = (x.view(2, 6, 24).repeat_interleave(2, 0).flatten(0, 1) for x in (k, v))
        state[name] = torch.cat((q, k, v))
    same.load_state_dict(state)
    for receiver in ((2, 1), (2, 3)):
        one, two = (path_patching(m, CLEAN, CORRUPT, ANSWERS, receivers=[receiver], part=part) for m in (model, same))
        torch.testing.assert_close(one, two)
        assert one.any()


def test_without_the_final_norm_effects_add_up() -> None:
    model = decoder(depth=1)
    model.norm = nn.Identity()
    settings = dict(receivers="blocks.0", freeze_mlps=True, normalise=False)
    effects = path_patching(model, CLEAN, CORRUPT, ANSWERS, **settings)
    with watch(model, keep="outputs") as other:
        model(CORRUPT)
    kept: dict = {}
    hook = model.blocks[0].mlp.register_forward_hook(lambda _, __, y: kept.setdefault("y", y))
    base = difference(model(CLEAN))
    with steer(model, Patch(other, queries=-1)):
        hook.remove()
        hook = model.blocks[0].mlp.register_forward_hook(lambda _, __, y: kept["y"])
        together = difference(model(CLEAN)) - base
    hook.remove()
    torch.testing.assert_close(effects.sum(), together)


def test_patching_everything_gives_the_other_run() -> None:
    model = decoder()
    everywhere, modules = slice(None), ["learned", *(f"blocks.{i}.mlp" for i in range(3))]
    tracer = Tracer(everywhere, modules=modules)
    leave = join(model, tracer)
    wanted = model(CORRUPT)
    leave()
    heads = {at: (z, torch.ones(z.shape[:2], dtype=torch.bool)) for at, z in tracer.trace.heads.items()}
    leave = join(model, Writer(everywhere, heads, tracer.trace.modules))
    found = model(CLEAN)
    leave()
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(model(CLEAN), wanted)


def test_how_many_go_at_once_and_the_batches_change_nothing_but_what_they_say() -> None:
    model = decoder()
    settings = dict(receivers=[(2, 0), (1, 2)], part="v", freeze_mlps="blocks.*.mlp")
    one = path_patching(model, CLEAN, CORRUPT, ANSWERS, together=1, **settings)
    torch.testing.assert_close(path_patching(model, CLEAN, CORRUPT, ANSWERS, together=64, **settings), one)
    parts = [path_patching(model, CLEAN[i], CORRUPT[i], ANSWERS[i], **settings) for i in (slice(0, 2), slice(2, 3))]
    torch.testing.assert_close(
        path_patching(model, CLEAN, CORRUPT, ANSWERS, batch=2, **settings), torch.stack(parts).mean(0)
    )
    # The senders of layer 1 come after the first receiver, and are asked only without truncation.
    assert not one[2].any() and one[0].any()
    assert path_patching(model, CLEAN, CORRUPT, ANSWERS, truncate=False, **settings)[1, 0] == one[1, 0]


def test_gpt2_of_transformers_is_patched_as_it_is(transformers) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=24, n_layer=2, n_head=3, vocab_size=13, n_positions=16, initializer_range=0.3
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    inputs = dict(input_ids=CLEAN), dict(input_ids=CORRUPT)
    effect = path_patching(model, *inputs, ANSWERS, receivers="transformer.h.1", freeze_mlps=True)
    seen: list = []
    hooks = [
        block.attn.c_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0][:, -1].clone()))
        for block in model.transformer.h
    ]
    hooks += [
        block.mlp.register_forward_hook(lambda _, __, y: seen.append(y[:, -1].clone())) for block in model.transformer.h
    ]
    model(CLEAN)
    clean = seen[:]
    seen.clear()
    model(CORRUPT)
    corrupt = seen[:]
    for hook in hooks:
        hook.remove()
    for layer in range(2):
        for head in range(3):
            hooks = []
            for i, block in enumerate(model.transformer.h):
                z = clean[2 * i].clone()
                if i == layer:
                    z[:, 8 * head : 8 * head + 8] = corrupt[2 * i][:, 8 * head : 8 * head + 8]
                hooks.append(block.attn.c_proj.register_forward_pre_hook(lambda _, x, z=z: last(x[0], z)))
                hooks.append(block.mlp.register_forward_hook(lambda _, __, y, m=clean[2 * i + 1]: last(y, m)))
            patched = difference(model(CLEAN).logits)
            for hook in hooks:
                hook.remove()
            base, whole = (difference(model(ids).logits) for ids in (CLEAN, CORRUPT))
            torch.testing.assert_close(effect[layer, head], (patched - base) / (whole - base))


def last(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.cat((x[:, :-1], value[:, None]), 1)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(corrupt=CLEAN), "corrupt must change"),
        (dict(answers=ANSWERS[:2]), "as many rows"),
        (dict(receivers=[(1, 4)], part="q"), r"\(1, 4\) is not there"),
        (dict(receivers=[(1, 0)]), "part must be"),
        (dict(receivers=[(1, 0)], part="z"), "part must be"),
        (dict(receivers=[], part="q"), "got none"),
        (dict(part="q"), "part goes with heads"),
        (dict(freeze_mlps="blocks.9.*"), "found no module"),
    ],
)
def test_what_cannot_be_asked_is_said(changes: dict, match: str) -> None:
    model = decoder()
    arguments = {**dict(clean=CLEAN, corrupt=CORRUPT, answers=ANSWERS, receivers="blocks.2"), **changes}
    before = model(CLEAN)
    with pytest.raises(ValueError, match=match):
        path_patching(model, **arguments)
    assert torch.equal(model(CLEAN), before)
