"""The tap: what it sees, what it changes, and that it leaves nothing behind."""

import math
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnlab
from attnlab import lens
from attnlab.patterns import Window


class Seen(lens.Subscriber):
    def __init__(self):
        self.events = []
        self.outs = []
        self.weights_seen = []

    def after(self, event, out):
        self.events.append(event)
        self.outs.append(out)
        self.weights_seen.append(event.weights())


class Identity(lens.Edit):
    """Takes the road by hand and changes nothing."""

    def weights(self, event, weights):
        return weights


class Zero(lens.Edit):
    def output(self, event, out):
        return self.put(event, torch.zeros_like(out), out)


class Attend(nn.Module):
    """Self or cross attention through torch's kernel."""

    def __init__(self, dim=16, heads=4):
        super().__init__()
        self.heads, self.wq, self.wkv, self.wo = (
            heads,
            nn.Linear(dim, dim),
            nn.Linear(dim, 2 * dim),
            nn.Linear(dim, dim),
        )

    def forward(self, x: Tensor, context: Tensor | None = None, causal: bool = False) -> Tensor:
        def split(t):
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        k, v = self.wkv(x if context is None else context).chunk(2, -1)
        out = F.scaled_dot_product_attention(split(self.wq(x)), split(k), split(v), is_causal=causal)
        return self.wo(out.transpose(1, 2).flatten(2))


class ByHand(Attend):
    def forward(self, x: Tensor) -> Tensor:
        k, v = self.wkv(x).chunk(2, -1)
        weights = F.dropout((self.wq(x) @ k.mT).softmax(-1), 0.1, training=False)
        return self.wo(weights @ v)


class Two(nn.Module):
    def __init__(self, first=Attend, second=Attend):
        super().__init__()
        self.first, self.second = first(), second()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.fixture
def x():
    return torch.randn(2, 6, 16)


def clean(model):
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def llama(transformers, layers=3):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


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


def test_attention_by_hand_is_named_with_its_remedy(x, timm, transformers):
    model = ByHand()
    with lens.steer(model, Seen()), pytest.raises(ValueError, match=r"by hand.*scaled_dot_product_attention"):
        model(x)
    model = llama(transformers)
    model.set_attn_implementation("eager")
    with lens.steer(model, Seen()), pytest.raises(ValueError, match=r"layers\.0\.self_attn .*set_attn_implementation"):
        model(torch.zeros(1, 3, dtype=torch.long))
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    model.blocks[0].attn.fused_attn = False
    with lens.steer(model, Seen()), pytest.raises(ValueError, match=r"blocks\.0\.attn .*fused_attn = True"):
        model(torch.randn(1, 3, 32, 32))
    model = Two(Attend, ByHand)
    with lens.steer(model, Seen()), pytest.warns(UserWarning, match="second computes its softmax by hand"):
        model(x)


def test_attention_by_hand_is_found_through_modules_views_and_slices(x, timm, transformers):
    class Sinks(Attend):
        def __init__(self):
            super().__init__()
            self.softmax = nn.Softmax(-1)

        def forward(self, x):
            k, v = self.wkv(x).chunk(2, -1)
            scores = F.pad(self.wq(x) @ k.mT, (0, 1))
            return self.wo((self.softmax(scores)[..., :-1].reshape(-1, *scores.shape[1:2] * 2)).bmm(v))

    model = Two(Sinks, Sinks)
    with lens.steer(model, Seen()), pytest.raises(ValueError, match=r"^first computes its softmax by hand"):
        model(x)
    sizes = dict(img_size=32, embed_dim=16, depths=(1,), num_heads=(2,), window_size=4)
    model = timm.create_model("swin_tiny_patch4_window7_224", **sizes)
    with lens.steer(model, Seen()), pytest.raises(ValueError, match=r"^layers.0.blocks.0.attn .*fused_attn = True"):
        model(torch.randn(1, 3, 32, 32))
    config = transformers.BloomConfig(vocab_size=16, hidden_size=16, n_layer=1, n_head=2)
    model = transformers.BloomModel(config)
    with lens.steer(model, Seen()), pytest.raises(ValueError, match=r"^h.0.self_attention .*no other for BloomModel"):
        model(torch.zeros(1, 3, dtype=torch.long))


def test_joint_attention_of_two_sequences_looks_at_itself(x):
    class Joint(Attend):
        def forward(self, hidden_states, encoder_hidden_states):
            return super().forward(torch.cat([encoder_hidden_states, hidden_states], 1))

    class Whole(Two):
        def __init__(self):
            super().__init__(Joint, Attend)

        def forward(self, x):
            return self.second(self.first(hidden_states=x, encoder_hidden_states=x[:, :2].clone()), context=x)

    with lens.tap(model := Whole()) as tap:
        tap.subscribe(seen := Seen())
        model(x)
    assert [e.kind for e in seen.events] == ["self", "cross"]


def test_a_softmax_that_is_no_attention_raises_no_alarm(x):
    class Classifies(Attend):
        def forward(self, x):
            return super().forward(x).softmax(-1)

    with lens.tap(Classifies()) as tap, warnings.catch_warnings():
        warnings.simplefilter("error")
        tap.subscribe(Seen())
        tap.model(x)


def test_what_is_not_there_is_said_with_what_is(x):
    model = Two()
    for wrong, said in (
        (dict(layers=5), r"layers \[5\] .*0 first, 1 second"),
        (dict(layers="third.*"), "third"),
        (dict(heads=4), "heads of first: 4 not there: there are 0 to 3"),
        (dict(queries=9), "queries of first: 9"),
    ):
        with pytest.raises(ValueError, match=said), lens.steer(model, Zero(**wrong)):
            model(x)
        assert clean(model)
    with pytest.raises(ValueError, match="steps must be 0 or more"):
        Zero(steps=-1)
    linear = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear made no attention call"), lens.steer(linear, Zero()):
        linear(torch.ones(2))


def test_a_second_tap_on_a_model_or_a_part_of_it_is_refused():
    model = Two()
    with lens.tap(model):
        for part in (model, model.first):
            with pytest.raises(ValueError, match="open tap already"), lens.tap(part):
                pass
    with lens.tap(model.first), pytest.raises(ValueError, match="first has an open tap already"), lens.tap(model):
        pass
    with lens.tap(model):
        pass


def test_edits_that_break_the_call_are_refused(x):
    class Shorter(lens.Edit):
        def output(self, event, out):
            return out[:, :, 1:]

    class Nothing(lens.Edit):
        def weights(self, event, weights):
            return None

    class Hide(lens.Edit):
        def scores(self, event, scores):
            return torch.full_like(scores, -math.inf)

    model = Attend()
    plain = model(x)
    for edit, error, said in (
        (Shorter(), ValueError, "Shorter.output must keep the shape"),
        (Nothing(), TypeError, "Nothing.weights must return a tensor, got NoneType"),
        (Hide(), ValueError, "Hide hides every key from a query"),
    ):
        with pytest.raises(error, match=said), lens.steer(model, edit):
            model(x)
    with pytest.raises(TypeError, match="edits must be Edits, got int"), lens.steer(model, [3]):
        pass
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"), lens.steer(3, Zero()):
        pass
    with pytest.raises(ValueError, match="compiled"), lens.steer(torch.compile(model), Zero()):
        pass
    assert torch.equal(model(x), plain)
    state = attnlab.build("kda", 16, heads=2)
    with pytest.raises(ValueError, match="running state: its weights can be edited"), lens.steer(state, Hide()):
        state(x)


@pytest.mark.parametrize(
    ("field", "change", "said"),
    [
        ("q", lambda e: e.q[:, :2], r"keep q of \(2, 4, 6, 4\)"),
        ("q", lambda e: e.q[:, :, :3], r"keep q of \(2, 4, 6, 4\)"),
        ("v", lambda e: e.v[..., :3], "values of 4"),
        ("k", lambda e: e.k[:, :, :3], r"keys and values .* k \(2, 4, 3, 4\)"),
        ("mask", lambda e: torch.ones(3, 7, dtype=torch.bool), r"a mask for \(2, 4, 6, 6\) at first, got \(3, 7\)"),
        ("mask", lambda e: torch.zeros(6, dtype=torch.bool), "hides every key from a query of first"),
        ("mask", lambda e: torch.full((6, 6), -math.inf), "hides every key from a query of first"),
    ],
)
def test_what_an_edit_puts_into_a_call_must_fit_and_show_something(x, field, change, said):
    class Puts(lens.Edit):
        def before(self, event):
            setattr(event, field, change(event))

    model = Two()
    before = model(x)
    with lens.steer(model, Puts(layers=0)), pytest.raises(ValueError, match=f"Puts.*{said}"):
        model(x)
    assert clean(model) and torch.equal(model(x), before)


def test_choices_of_nothing_or_of_another_type_are_refused(x):
    model = Two()
    for wrong, error, said in (
        (dict(layers=slice(5, 9)), ValueError, r"slice\(5, 9, None\).* do not attend .*0 first, 1 second"),
        (dict(heads=slice(7, 9)), ValueError, "none in .*there are 0 to 3"),
        (dict(heads=[1.5]), TypeError, "heads of first"),
        (dict(heads="a"), TypeError, "heads of first"),
        (dict(layers=[1.5]), TypeError, "layers are"),
        (dict(layers=1.5), TypeError, "layers are"),
        (dict(layers=[]), ValueError, "chooses nothing"),
        (dict(heads=[]), ValueError, "chooses nothing"),
        (dict(tokens=[]), ValueError, "tokens must"),
        (dict(grid=4), ValueError, "grid must"),
        (dict(prefix=-1), ValueError, "prefix must"),
        (dict(keep="stats", sinks=-1), ValueError, "sinks must"),
        (dict(dtype=torch.int8), ValueError, "dtype must"),
    ):
        with pytest.raises(error, match=said), lens.watch(model, **wrong):
            model(x)
    with pytest.raises(TypeError, match=r"edits must be Edits, got .*Ablate"), lens.steer(model, lens.Ablate):
        model(x)
    assert clean(model)


def test_a_replaced_pattern_runs_fused_and_right(x):
    class Narrow(lens.Edit):
        def before(self, event):
            event.pattern = Window(2)

    model = Attend()
    with lens.tap(model) as tap:
        tap.subscribe(Narrow())
        tap.subscribe(seen := Seen())
        model(x)
    (event,) = seen.events
    wanted = event.scores().masked_fill(~Window(2).matrix(6), -math.inf).softmax(-1) @ event.v
    torch.testing.assert_close(seen.outs[0], wanted)
