"""The tap: what it sees, what it changes, and that it leaves nothing behind."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnlab
from attnlab import lens
from lens.tapped import Attend, Identity, Seen, Two, Zero, clean, llama


@pytest.fixture
def x():
    return torch.randn(2, 6, 16)


def check(model, *inputs, layers, pick=lambda y: y, **keywords):
    """What watching leaves bit for bit as it was, what an identity by hand leaves to rounding; the events."""
    with torch.no_grad():
        before = pick(model(*inputs, **keywords))
        with lens.tap(model) as tap:
            tap.subscribe(seen := Seen())
            watched = pick(model(*inputs, **keywords))
        with lens.steer(model, Identity()):
            by_hand = pick(model(*inputs, **keywords))
        after = pick(model(*inputs, **keywords))
    torch.testing.assert_close(watched, before, rtol=0, atol=2e-6)
    torch.testing.assert_close(by_hand, before, rtol=1e-5, atol=1e-5)
    assert torch.equal(after, before)
    assert clean(model)
    assert len(tap.names) == layers
    for event, out, weights in zip(seen.events, seen.outs, seen.weights_seen, strict=True):
        torch.testing.assert_close(event.mix(weights), out, rtol=1e-5, atol=1e-5)
    return seen.events


def test_a_timm_vit(timm):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    events = check(model, torch.randn(2, 3, 32, 32), layers=2)
    assert [(e.name, e.layer, e.kind, e.causal, e.source) for e in events] == [
        ("blocks.0.attn", 0, "self", False, "sdpa"),
        ("blocks.1.attn", 1, "self", False, "sdpa"),
    ]
    assert events[0].module is model.blocks[0].attn


@pytest.mark.parametrize("padded", [False, True])
def test_a_transformers_decoder_with_its_head_groups_undone(transformers, padded):
    model = llama(transformers)
    ids = torch.randint(2, 64, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0 if padded else 1
    events = check(model, ids, attention_mask=mask, layers=3, pick=lambda y: y.logits)
    assert [(e.name, e.heads, e.kv_heads, e.causal) for e in events] == [
        (f"model.layers.{i}.self_attn", 4, 2, True) for i in range(3)
    ]
    if padded:
        assert not events[0].weights()[0, :, 3:, :3].any()


def test_generation_with_a_cache_counts_its_steps(transformers):
    model = llama(transformers, layers=2)
    ids = torch.randint(2, 64, (1, 5))
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)
    with lens.tap(model) as tap:
        tap.subscribe(seen := Seen())
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), plain)
    assert [(e.step, e.layer, e.q.shape[2], e.k.shape[2], e.offset) for e in seen.events if e.layer == 0] == [
        (0, 0, 5, 5, 0), (1, 0, 1, 6, 5), (2, 0, 1, 7, 6), (3, 0, 1, 8, 7)
    ]  # fmt: skip
    assert all(e.kind == "self" and e.causal for e in seen.events)


def test_torchs_own_layers_whose_fast_path_makes_no_call(x):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    events = check(nn.TransformerEncoder(layer, 2).eval(), x, layers=2)
    assert [e.source for e in events] == ["multi_head_attention_forward"] * 2
    model = nn.Transformer(16, 4, 1, 1, 32, batch_first=True).eval()
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    events = check(model, x, x + 1, tgt_mask=causal, layers=3)
    assert [(e.kind, e.causal) for e in events] == [("self", False), ("self", True), ("cross", False)]


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_multihead_attention_gives_the_weights_that_it_is_asked_for(x, batched, averaged):
    module = nn.MultiheadAttention(16, 4, batch_first=True, add_bias_kv=True, add_zero_attn=True)
    query = x if batched else x[0]
    wanted = module(query, query, query, average_attn_weights=averaged)
    with lens.tap(module) as tap:
        tap.subscribe(Seen())
        got = module(query, query, query, average_attn_weights=averaged)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_diffusers_unet(torchvision_schemas):
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8,
    ).eval()  # fmt: skip
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 5, 16))
    events = check(model, *inputs, layers=8, pick=lambda y: y.sample)
    assert {(e.name.rsplit(".", 1)[1], e.kind) for e in events} == {("attn1", "self"), ("attn2", "cross")}


def test_our_own_operators_arrive_with_pattern_and_state(x):
    window = attnlab.build("sliding_window", 16, heads=2, window=3, causal=True)
    (event,) = check(window, x, layers=1)
    assert event.source == "attend"
    assert event.pattern is not None and event.causal
    (event,) = check(attnlab.build("kda", 16, heads=2).eval(), x, layers=1)
    assert event.source == "scan" and event.decay is not None
    assert not event.weights().triu(1).any()


def test_streaming_from_a_cache_is_seen_step_by_step(x):
    model = attnlab.build("multihead", 16, heads=2, causal=True)
    state = model.initial_state(2)
    with lens.tap(model) as tap, torch.no_grad():
        tap.subscribe(seen := Seen())
        for t in range(6):
            _, state = model(x[:, t : t + 1], state=state)
    whole = Seen()
    with lens.tap(model) as tap, torch.no_grad():
        tap.subscribe(whole)
        model(x)
    for t, weights in enumerate(seen.weights_seen):
        torch.testing.assert_close(weights[:, :, 0], whole.weights_seen[0][:, :, t, : t + 1], rtol=1e-5, atol=1e-6)


def test_edits_compose_in_order_and_keep_to_their_region(x):
    class Add(lens.Edit):
        def scores(self, event, scores):
            return self.put(event, scores + 3.0, scores)

    class Flat(lens.Edit):
        def weights(self, event, weights):
            return self.put(event, torch.full_like(weights, 1 / weights.shape[-1]), weights)

    model = Attend()
    with lens.tap(model) as tap:
        tap.subscribe(plain := Seen())
        model(x)
    with lens.tap(model) as tap:
        for s in (Add(heads=1, keys=[0]), Flat(heads=-1, queries=slice(2, None)), Zero(heads=0), changed := Seen()):
            tap.subscribe(s)
        model(x)
    (before,), (after,), (event,) = plain.weights_seen, changed.weights_seen, plain.events
    scores = event.scores()
    scores[:, 1, :, 0] += 3.0
    wanted = scores.softmax(-1)
    wanted[:, 3, 2:] = 1 / 6
    torch.testing.assert_close(after, wanted)
    assert torch.equal(after[:, 2], before[:, 2])
    assert not changed.outs[0][:, 0].any() and changed.outs[0][:, 1].any()


def test_a_watcher_joins_where_the_model_is_steered(x):
    model = Two()
    with lens.steer(model, Zero(layers=0)):
        with lens.steer(model, Zero(layers=[-1], heads=0)):
            steered = model(x)
        half = model(x)
    assert torch.equal(half, model.second(model.first.wo.bias.expand(2, 6, 16)))
    assert not torch.equal(steered, half)
    assert clean(model)


def test_gradient_checkpointing_recomputes_what_was_steered(x):
    class Checkpointed(Two):
        def forward(self, x):
            return self.second(checkpoint(self.first, x, use_reentrant=False))

    class Double(lens.Edit):
        def output(self, event, out):
            return 2 * out

    plain, model = Two(), Checkpointed()
    model.load_state_dict(plain.state_dict())
    grads = []
    for m in (plain, model):
        with lens.steer(m, [Double(), seen := Seen()]):
            m(x).sum().backward()
        grads.append([p.grad for p in m.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    assert [(e.name, e.recomputed, e.index) for e in seen.events] == [
        ("first", False, 0), ("second", False, 0), ("first", True, 0)
    ]  # fmt: skip


def test_each_thread_that_runs_the_model_is_seen(x):
    model = Two()
    with lens.tap(model) as tap:
        tap.subscribe(seen := Seen())
        threads = [threading.Thread(target=model, args=(x,)) for _ in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert sorted((e.step, e.layer) for e in seen.events) == [(s, i) for s in range(3) for i in range(2)]


def test_other_models_are_not_seen(x):
    model, other = Attend(), Attend()
    with lens.tap(model) as tap:
        tap.subscribe(seen := Seen())
        other(x)
        assert not seen.events
        model(x)
    assert len(seen.events) == 1


def test_an_exception_in_the_model_leaves_nothing_behind(x):
    model = Two()
    with lens.steer(model, Zero()):
        with pytest.raises(RuntimeError):
            model(x[..., :3])
        out = model(x)
    assert torch.equal(out[0, 0], model.second.wo.bias)
    with pytest.raises(KeyError), lens.steer(model, Zero()):
        raise KeyError
    assert clean(model)
    assert torch.equal(torch.ones(2).softmax(0), torch.full((2,), 0.5))  # no mode is left on the stack
    assert torch._C._len_torch_function_stack() == 0


def test_nothing_is_installed_before_somebody_subscribes(x):
    model = Two()
    with lens.tap(model):
        assert clean(model)  # so that it costs nothing
        model(x)


def test_edited_scores_reach_the_parts_that_are_merged_by_their_lse(x):
    class Parts(Attend):
        """Attention over the first keys and over the others, merged."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, (k, v) = self.wq(x), self.wkv(x).chunk(2, -1)
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
            parts = [attnlab.attend(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 2), slice(2, None))]
            return self.wo(attnlab.merge(parts)[0].transpose(1, 2).flatten(2))

    class First(lens.Edit):
        """Three more on the scores of the first key of all."""

        def scores(self, event, scores):
            more = torch.zeros_like(scores)
            more[..., 0] = 3.0 * (event.index == 0)
            return scores + more

    whole, parts = Attend(), Parts()
    parts.load_state_dict(whole.state_dict())
    with lens.steer(whole, First()):
        wanted = whole(x)
    with lens.steer(parts, First()):
        torch.testing.assert_close(parts(x), wanted, rtol=1e-5, atol=1e-6)
