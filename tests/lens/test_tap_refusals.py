"""What the tap cannot see, what is not there, and what breaks a call: said, and the model as it was."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnlab
from attnlab import lens
from attnlab.patterns import Window
from lens.tapped import Attend, ByHand, Seen, Two, Zero, clean, llama


@pytest.fixture
def x():
    return torch.randn(2, 6, 16)


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
