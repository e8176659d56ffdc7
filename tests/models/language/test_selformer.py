"""SELFormer: equal to RoBERTa, blind to padding, and trained as the authors do."""

from __future__ import annotations

import pytest
import torch

from attnlab.hub import load_official
from attnlab.hub.official.selformer import Roberta
from attnlab.models.language.bpe import ByteTokenizer
from attnlab.models.language.molecules import random_selfies
from attnlab.models.language.selformer import Selformer
from attnlab.recipes.minilm import warm_then_decay
from attnlab.recipes.selformer import mask_tokens, masked_loss, property_loss, train

TINY = dict(vocabulary=40, dim=16, depth=2, heads=2, length=20)


def model(**options) -> Selformer:
    torch.manual_seed(0)
    net = Selformer(**{**TINY, "dropout": 0.0, **options}).double().eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


def texts(n: int = 8) -> torch.Tensor:
    return torch.randint(5, 40, (3, n), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "output"), [("RobertaForMaskedLM", "words"), ("RobertaForSequenceClassification", "labels")]
)
def test_equals_transformers_roberta_with_its_checkpoint(transformers, tmp_path, kind, output):
    config = transformers.RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=22, type_vocab_size=1, pad_token_id=1, num_labels=3,
    )  # fmt: skip
    peer = getattr(transformers, kind)(config).eval()
    for p in peer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    torch.save(peer.state_dict(), tmp_path / "model.pt")
    ours = load_official(Selformer(**TINY, output=output, labels=3), tmp_path / "model.pt").eval()
    ids, keep = texts(), torch.arange(8) < torch.tensor([[8], [5], [3]])
    ids = ids.where(keep, 1)
    torch.testing.assert_close(ours(ids, keep=keep), peer(ids, attention_mask=keep.long()).logits, rtol=1e-4, atol=1e-5)
    built = Roberta.build({"num_attention_heads": 2}, dict(peer.state_dict()))
    assert torch.equal(built(ids, keep=keep), ours(ids, keep=keep))


@pytest.mark.parametrize("output", ["words", "labels"])
def test_padding_changes_nothing(output):
    net, ids = model(output=output), texts()
    padded = torch.cat((ids, torch.ones(3, 4, dtype=torch.long)), 1)
    keep = torch.arange(12).expand(3, -1) < 8
    alone, long = net(ids), net(padded, keep=keep)
    torch.testing.assert_close(long[:, :8] if output == "words" else long, alone)
    torch.testing.assert_close(net.embed(padded, keep), net.embed(ids))


def test_order_matters():
    net, ids = model(output="labels"), texts()
    assert not torch.allclose(net(ids.roll(1, 1)), net(ids), atol=1e-3)


def test_places_begin_behind_the_paddings_id():
    net, ids = model(), texts(20)
    assert len(net.positions.weight) == 22
    before = net(ids)
    with torch.no_grad():
        net.positions.weight[:2, 0] += 1.0
    assert torch.equal(net(ids), before)
    with torch.no_grad():
        net.positions.weight[21, 0] += 1.0
    assert not torch.allclose(net(ids), before)
    with pytest.raises(ValueError, match="length = 20, got"):
        net(texts(21))


def test_the_embedding_is_the_mean_of_the_last_vectors():
    net, ids = model(output="tokens"), texts()
    keep = torch.arange(8) < torch.tensor([[8], [5], [3]])
    found = net.embed(ids, keep)
    for b, n in enumerate((8, 5, 3)):
        torch.testing.assert_close(found[b], net(ids[b : b + 1, :n])[0].mean(0))


def test_a_new_model_starts_as_the_authors():
    torch.manual_seed(0)
    net = Selformer(vocabulary=800, dim=64, depth=1, heads=4, output="labels")
    for weight in (net.words.weight, net.blocks[0].mixer.wqkv.weight, net.head[1].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not net.words.weight[1].any() and not net.positions.weight[1].any() and not net.head[4].bias.any()


@pytest.mark.parametrize(("name", "labels", "count"), [("selformer", 2, 86_658_050), ("selformer_lite", 2, 58_306_562)])
def test_classifiers_have_the_authors_number_of_parameters(name, labels, count):
    with torch.device("meta"):
        net = Selformer(**Selformer.card.sizes[name].arguments, output="labels", labels=labels)
    assert sum(p.numel() for p in net.parameters()) == count


def test_riddles_mask_what_bert_masks():
    ids = torch.randint(5, 40, (400, 30), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    keep = torch.arange(30).expand(400, -1) < 25
    holes, chosen = mask_tokens(
        ids, keep, mask=4, vocabulary=40, specials=range(5), generator=torch.Generator().manual_seed(1)
    )
    assert not chosen[:, 0].any() and not chosen[~keep].any()
    assert torch.equal(holes[~chosen], ids[~chosen])
    assert chosen[:, 1:25].double().mean().item() == pytest.approx(0.15, abs=0.01)
    kinds = holes[chosen]
    assert (kinds == 4).double().mean().item() == pytest.approx(0.8 + 0.1 / 40, abs=0.03)
    assert (kinds == ids[chosen]).double().mean().item() == pytest.approx(0.1 + 0.1 / 40, abs=0.03)
    again, other = mask_tokens(ids, keep, mask=4, vocabulary=40, specials=range(5))
    assert not torch.equal(other, chosen) and not torch.equal(again, holes)
    _, few = mask_tokens(ids[:1, :3], keep[:1, :3], mask=4, vocabulary=40, specials=range(5), rate=1e-9)
    assert few.sum() == 1


def test_only_chosen_tokens_are_guessed():
    net, ids = model(), texts()
    holes, chosen = mask_tokens(ids, torch.ones(3, 8), mask=4, vocabulary=40, specials=range(5), rate=0.4)
    wanted = torch.nn.functional.cross_entropy(net(holes).mT, ids.where(chosen, -100), ignore_index=-100)
    torch.testing.assert_close(masked_loss(net, ids, holes, chosen), wanted)


def test_losses_of_properties_are_the_papers():
    logits = torch.randn(6, 3, dtype=torch.float64)
    classes, tasks, number = torch.tensor([0, 2, 1, 1, 0, 2]), torch.rand(6, 3).round(), torch.randn(6).double()
    picked = logits.log_softmax(1)[range(6), classes]
    torch.testing.assert_close(property_loss(logits, classes, "classes"), -picked.mean())
    p = logits.sigmoid()
    torch.testing.assert_close(
        property_loss(logits, tasks, "tasks"), -(tasks * p.log() + (1 - tasks) * (1 - p).log()).mean()
    )
    wanted = ((logits[:, 0] - number) ** 2).mean()
    torch.testing.assert_close(property_loss(logits[:, :1], number, "number"), wanted)
    torch.testing.assert_close(property_loss(logits[:, :1], number.unsqueeze(1), "number"), wanted)


def test_pretraining_falls_below_the_unigram_entropy_and_is_carried_to_the_properties():
    generator = torch.Generator().manual_seed(0)
    lines = random_selfies(400, most=3, generator=generator)
    tokenizer = ByteTokenizer.train(lines, size=290)
    ids, keep = tokenizer.encode(lines)
    shares = torch.bincount(ids[keep & (ids > 4)]).double()
    shares = shares[shares > 0] / shares.sum()
    unigram = -(shares * shares.log()).sum().item()

    def riddles(steps: int):
        for _ in range(steps):
            rows = torch.randint(len(ids), (16,), generator=generator)
            riddle = mask_tokens(
                ids[rows], keep[rows], mask=4, vocabulary=len(tokenizer), specials=range(5), generator=generator
            )
            yield {"ids": ids[rows], "holes": riddle[0], "chosen": riddle[1], "keep": keep[rows]}

    torch.manual_seed(0)
    net = Selformer(vocabulary=len(tokenizer), dim=32, depth=2, heads=4, length=ids.shape[1], dropout=0.0)
    history = train(net, riddles(120), masked_loss, rate=warm_then_decay(6e-3, 120, warm_up=10))
    assert sum(history[-20:]) / 20 < 0.75 * unigram
    tuned = net.for_labels(1).eval()
    assert torch.equal(tuned.encode(ids[:4], keep=keep[:4]), net.eval().encode(ids[:4], keep=keep[:4]))
    assert tuned(ids[:4]).shape == (4, 1)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="output"):
        Selformer(**TINY, output="pooled")
    with pytest.raises(ValueError, match="labels"):
        Selformer(**TINY, output="labels", labels=0)
    with pytest.raises(ValueError, match="pad"):
        Selformer(**TINY, pad=40)
    with pytest.raises(ValueError, match="keep"):
        model()(texts(), keep=torch.ones(3, 7))
    with pytest.raises(ValueError, match="output='words'"):
        masked_loss(model(output="tokens"), texts(), texts(), texts() > 0)
    with pytest.raises(ValueError, match="rate"):
        mask_tokens(texts(), texts() > 0, mask=4, vocabulary=40, specials=[], rate=0.0)
    with pytest.raises(ValueError, match="task must be one of"):
        property_loss(torch.zeros(2, 1), torch.zeros(2), "regression")
    with pytest.raises(ValueError, match="as many labels"):
        property_loss(torch.zeros(2, 2), torch.zeros(2), "number")
