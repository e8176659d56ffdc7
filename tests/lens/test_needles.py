"""The whole detector: a head that copies scores one, a trained model's retrieval heads are found and are needed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab import build
from attnlab.lens.edits.heads_off import HeadsOff
from attnlab.lens.measures.retrieval import HeadScores
from attnlab.lens.needles import DEPTHS, Needle, bury, detect, score_heads, write
from attnlab.lens.steer import steer
from attnlab.lens.toys import recall

WORDS = "<unk> . : the secret is red cat dog tree what big small yes no list image left blue all".split()


class Words:
    """A tokenizer of words between spaces."""

    def encode(self, text: str) -> list[int]:
        return [WORDS.index(w) if w in WORDS else 0 for w in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(WORDS[i] for i in ids) + " "


class Induction(nn.Module):
    """One head that looks at what came after the token that it is at, and says it again; another looks at its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.eye(len(WORDS)))

    def initial_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, 0, dtype=torch.long)

    def forward(self, ids: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.cat((state, ids), 1)
        before = F.pad(state[:, :-1], (1, 0))
        q = 100 * self.table[ids]
        k, v = torch.stack((self.table[before], self.table[state]), 1), self.table[state][:, None]
        place = torch.arange(state.shape[1])
        seen = place <= place[-ids.shape[1] :, None]
        heads = F.scaled_dot_product_attention(q[:, None].expand(-1, 2, -1, -1), k, v.expand(-1, 2, -1, -1), seen)
        return heads[:, 0], state


NEEDLE = Needle("the secret is : red cat dog tree .", "what is the secret :", "red cat dog tree")
HAYSTACK = "the big image is left . all small list no . yes the blue image . "
HOW = dict(lengths=[40, 80], depths=[0, 50, 100], room=10, stop=[1], question="{question}")


def test_a_head_that_copies_scores_one_and_the_others_nothing() -> None:
    scores, trials = detect(Induction(), Words(), [NEEDLE], [HAYSTACK], **HOW)
    assert len(trials) == 6 and all(t.accepted and t.recall == 1.0 for t in trials)
    assert {t.response for t in trials} == {"red cat dog tree"}
    assert scores.mean().tolist() == [[pytest.approx(1.0), 0.0]]
    assert scores.retrieval() == [(0, 0)]


@pytest.mark.parametrize("style", ["uniform", "zero"])
def test_without_its_copying_head_the_model_finds_no_needle(style: str) -> None:
    scores, trials = detect(Induction(), Words(), [NEEDLE], [HAYSTACK], **HOW, without=[(0, 0)], style=style)
    assert not any(t.accepted for t in trials) and not scores.tables  # dropped, not zeroed
    _, trials = detect(Induction(), Words(), [NEEDLE], [HAYSTACK], **HOW, without=[(0, 1)], style=style)
    assert all(t.accepted for t in trials)


def test_needles_are_buried_after_full_stops() -> None:
    context, needle = [5, 6, 1, 7, 8, 9, 1, 5, 5, 5, 5, 5], [2, 3]
    assert bury(context, needle, 12, 50, full_stops=[1], room=0) == [5, 6, 1, 2, 3, 7, 8, 9, 1, 5, 5, 5]
    assert bury(context, needle, 12, 100, full_stops=[1], room=0)[-2:] == needle
    assert bury(context, needle, 12, 0, full_stops=[1], room=0)[:2] == needle
    assert bury(context, needle, 12, 15, full_stops=[1], room=0)[:2] == needle  # no full stop before
    assert len(bury(context, needle, 12, 50, full_stops=[1], room=4)) == 8
    assert len(DEPTHS) == 10 and DEPTHS[0] == 0 and DEPTHS[-1] == 100


@torch.no_grad()
def answered(model, prompts: recall.Prompts, *edits: HeadsOff) -> float:
    with steer(model, list(edits)):
        _, state = model(prompts.ids[:, :-1], model.initial_state(len(prompts.ids)))
        logits, _ = model(prompts.ids[:, -1:], state)
    return (logits[:, -1].argmax(-1) == prompts.answers).double().mean().item()


def test_the_retrieval_heads_of_a_trained_model_are_found_and_needed() -> None:
    """Key-value recall: heads of the second layer copy. Without them recall is lost, without as many others not."""
    model, prompts = recall.train(), recall.batch(64, seed=5)
    scores = HeadScores()
    for ids, answer in zip(prompts.ids[:32], prompts.answers[:32], strict=True):
        written, table = score_heads(model, ids, [int(answer)], new=1)
        if written == [int(answer)]:
            scores.add(table)
    assert len(scores.tables) >= 30
    assert scores.mean()[1].max() > 0.8 and scores.mean()[0].max() < 0.2
    found, rest = scores.best(4), scores.ranked()[4:]
    assert {layer for layer, _ in found} == {1}
    assert answered(model, prompts) > 0.95
    for style in ("uniform", "zero"):
        assert answered(model, prompts, HeadsOff(found, style)) < 0.3
        assert answered(model, prompts, HeadsOff(rest, style)) > 0.8


def test_a_model_of_transformers_writes_as_it_generates(transformers) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    prompt = torch.randint(64, (60,))
    written, table = score_heads(model, prompt, prompt[20:28], new=10)
    with torch.no_grad():
        wanted = model.generate(
            prompt[None], attention_mask=torch.ones(1, 60), max_new_tokens=10, do_sample=False, eos_token_id=None
        )
    assert written == wanted[0, 60:].tolist()
    assert table.shape == (2, 4) and table.max() <= 2 / 8  # near chance
    assert write(model, prompt, 10, stop=[written[2]])[-1] == written[2]


def test_our_own_models_write_as_they_generate() -> None:
    model = build("llama", vocabulary=40, dim=32, depth=2, heads=4, kv_heads=2, hidden=48).eval()
    prompt = torch.randint(40, (20,))
    assert write(model, prompt, 6) == model.generate(prompt[None], 6, temperature=0)[0, 20:].tolist()


def test_bad_input_is_named() -> None:
    model = Induction()
    with pytest.raises(ValueError, match="ids of one text"):
        write(model, torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="depth"):
        bury([1], [2], 5, 120, full_stops=[], room=0)
    with pytest.raises(ValueError, match="length must leave 200"):
        bury([1], [2], 100, 50, full_stops=[])
    with pytest.raises(ValueError, match="as many as needles"):
        detect(model, Words(), [NEEDLE], [], lengths=[40])
