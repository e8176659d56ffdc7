"""attnlab lens: from a model and an input to a summary and a page, or to one sentence that says what is wrong."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from attnlab.cli import app

runner = CliRunner()


@pytest.fixture
def lens(tmp_path, monkeypatch):
    """Runs the command; returns what it printed and what is on its page."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        result = runner.invoke(app, ["lens", *map(str, arguments), "--out", "page.html"])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        page = (tmp_path / "page.html").read_text()
        return result.output, json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])

    return run


@pytest.fixture(scope="module")
def llama(transformers, tmp_path_factory):
    """A folder with a language model's config alone."""
    folder = tmp_path_factory.mktemp("llama")
    config(transformers, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return folder


def config(transformers, **more):
    return transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def vit(timm, tmp_path_factory):
    """A folder as timm writes it, without weights: a small vision transformer on 32×32."""
    folder = tmp_path_factory.mktemp("vit")
    arguments = dict(img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=4)
    about = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": arguments}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 80, 3), np.uint8)).save(path)
    return path


def test_a_text_on_random_weights_says_so_and_names_its_tokens(lens, llama):
    output, page = lens(llama, "To be, or not")
    assert "The weights are random (seed 0)" in output and "read as bytes" in output
    assert any("random" in note for note in page["notes"]) and page["facts"]["weights"] == "random, seed 0"
    assert page["spaces"][0]["labels"] == list("To be, or not")
    assert [layer["name"] for layer in page["layers"]] == [f"model.layers.{i}.self_attn" for i in range(3)]
    names = [measure["name"] for measure in page["measures"]]
    assert names == ["importance", "entropy", "distance", "sink share", "strongest key"]
    assert all(np.shape(measure["values"]) == (3, 4) for measure in page["measures"])
    assert "model.layers.1.self_attn" in output and "most important heads" in output and "page.html" in output


def test_the_numbers_are_those_of_the_models_own_attention(lens, llama, transformers):
    _, page = lens(llama, "To be, or not", "--no-importance")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(llama), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        maps = torch.cat(model(torch.tensor([list(b"To be, or not")]), output_attentions=True).attentions)
    shown = {measure["name"]: torch.tensor(measure["values"]) for measure in page["measures"]}
    torch.testing.assert_close(shown["entropy"], -torch.xlogy(maps, maps).sum(-1).mean(-1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(shown["sink share"], maps[..., 0].mean(-1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(shown["strongest key"], maps.mean(-2).amax(-1), rtol=1e-3, atol=1e-4)
    place = torch.arange(13.0)
    far = (maps * (place[:, None] - place).abs()).sum(-1).mean(-1)
    torch.testing.assert_close(shown["distance"], far, rtol=1e-3, atol=1e-4)


def test_weights_in_the_folder_are_read_and_a_text_file_too(lens, transformers, tmp_path):
    transformers.LlamaForCausalLM(config(transformers)).save_pretrained(tmp_path / "trained")
    (tmp_path / "text.txt").write_text("Good morning", encoding="utf-8")
    output, page = lens(tmp_path / "trained", tmp_path / "text.txt", "--layers", "-1,0", "--heads", "1-2")
    assert "weights are random" not in output and page["facts"]["weights"].endswith("trained")
    assert [layer["number"] for layer in page["layers"]] == [0, 2]
    assert all(layer["heads"] == [1, 2] for layer in page["layers"])


def test_an_image_on_a_timm_model_has_all_three_analyses(lens, vit, picture):
    output, page = lens(vit, picture, "--labels", "3")
    (space,) = page["spaces"]
    assert space["grid"] == [4, 4] and space["start"] == 1 and space["labels"][:2] == ["[class]", "row 0, column 0"]
    assert page["images"][0].startswith("data:image/jpeg")
    assert set(page["analytics"]) == {"importance", "distance", "patterns"}
    assert set(page["analytics"]["importance"]["scores"]) == {"jsd", "d_prob", "abs_d_pred", "acc_drop", "cls_cos"}
    assert len(page["analytics"]["patterns"]["labels"]) == 8
    assert page["measures"][2]["unit"] == "patches"
    assert "expected hops by layer" in output and "patterns:" in output


def test_a_batch_of_images_in_a_tensor_file_is_looked_at_together(lens, vit, tmp_path):
    save_file({"images": torch.randn(3, 3, 32, 32), "labels": torch.tensor([0, 4, 4])}, tmp_path / "set.safetensors")
    _, page = lens(vit, tmp_path / "set.safetensors", "--metric", "cls_cos", "--mode", "keep_one", "--ablate", "mean")
    importance = page["analytics"]["importance"]
    assert importance["classes"] == [0, 4] and importance["smallest"] and "3 inputs" in importance["about"]
    assert len(page["analytics"]["patterns"]["labels"]) == 3 * 8
    np.save(tmp_path / "one.npy", np.zeros((3, 32, 32), np.float32))
    _, page = lens(vit, tmp_path / "one.npy", "--no-importance")
    assert "importance" not in page["analytics"]


def test_a_folder_of_images_shows_the_first(lens, vit, tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("b.png", "a.png"):
        Image.new("RGB", (40, 40), "red" if name == "a.png" else "blue").save(tmp_path / "set" / name)
    output, _ = lens(vit, tmp_path / "set", "--no-importance")
    assert "2 images of set" in output and "a.png is shown" in output


def test_a_vision_language_model_is_asked_about_an_image(lens, transformers, picture, tmp_path):
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )  # fmt: skip
    whole = transformers.LlavaConfig(
        vision_config=vision, text_config=config(transformers), image_token_index=299,
        architectures=["LlavaForConditionalGeneration"],
    )  # fmt: skip
    whole.save_pretrained(tmp_path / "llava")
    output, page = lens(tmp_path / "llava", picture, "--prompt", "What?")
    assert "image tokens come first" in output
    spaces = [page["spaces"][layer["q"]] for layer in page["layers"]]
    assert [(space["grid"], space["start"], space["count"]) for space in spaces] == [
        *[([2, 2], 1, 5)] * 2, *[([2, 2], 0, 9)] * 3,
    ]  # fmt: skip
    assert spaces[-1]["labels"][4:] == list("What?")


def test_token_ids_and_networks_of_our_own(lens, tmp_path):
    torch.save(torch.randint(0, 64, (1, 20)), tmp_path / "ids.pt")
    _, page = lens("attnlab:llama", tmp_path / "ids.pt", "--no-importance")
    assert page["spaces"][0]["count"] == 20 and page["facts"]["model"].endswith("(attnlab)")


def test_weights_come_from_a_file(lens, vit, picture, tmp_path, timm):
    torch.manual_seed(5)
    about = json.loads((vit / "config.json").read_text())
    model = timm.create_model(about["architecture"], num_classes=5, **about["model_args"])
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    output, _ = lens(vit, picture, "--weights", tmp_path / "weights.safetensors", "--no-importance")
    assert "weights are random" not in output
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"does not fit .*; missing: .*left over: other"):
        lens(vit, picture, "--weights", tmp_path / "other.safetensors")


# What cannot be done


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("nowhere/model", "text"), FileNotFoundError, "there is no folder nowhere/model"),
        (("vit_tny_patch16_224", "text"), ValueError, "did you mean 'vit_tiny_patch16_224'"),
        (("timm:vit_tny", "text"), ValueError, "timm has no 'vit_tny'"),
        (("attnlab:gated", "text"), ValueError, "'gated' is a tokens, and a network is wanted"),
        ((".", "text"), ValueError, "has no config.json"),
        (("LLAMA", "missing.txt"), FileNotFoundError, "there is no file missing.txt"),
        (("LLAMA", "missing.png"), FileNotFoundError, "there is no file missing.png"),
        (("LLAMA", " "), ValueError, "the text is empty"),
        (("LLAMA", "PICTURE"), ValueError, "reads text, and .*noise.png is an image"),
        (("VIT", "a text"), ValueError, "reads images, and this is a text: 'a text'"),
        (("LLAMA", "x" * 65), ValueError, "65 tokens, but .* has positions for 64: cut it with --tokens 64"),
        (("LLAMA", "x", "--layers", "3"), ValueError, r"layers \[3\] do not attend .*0 model.layers.0.self_attn"),
        (("LLAMA", "x", "--layers", "nose*"), ValueError, r"layers \['nose\*'\] do not attend"),
        (("LLAMA", "x", "--heads", "4"), ValueError, "there are 0 to 3"),
        (("LLAMA", "x", "--heads", "first"), ValueError, "heads: 'first' must be numbers"),
        (("LLAMA", "x", "--layers", "3-1"), ValueError, "layers: '3-1' cannot be read"),
        (("LLAMA", "x", "--labels", "1,2"), ValueError, "labels: 2 were given for 1 inputs"),
        (("LLAMA", "x", "--metric", "beauty"), ValueError, "metric: 'beauty' was not measured"),
        (("VIT", "PICTURE", "--metric", "acc_drop"), ValueError, r"'acc_drop' was not measured \(it may need labels\)"),
        (("VIT", "broken.png"), ValueError, "is no readable image"),
        (("VIT", "broken.npy"), ValueError, "is no readable array"),
        (("VIT", "broken.safetensors"), ValueError, "not a readable safetensors file"),
        (("VIT", "broken.pt"), ValueError, "is corrupt, or holds more than tensors"),
        (("VIT", "whole.pt"), ValueError, "is corrupt, or holds more than tensors"),
        (("VIT", "grey.npy"), ValueError, r"images must be \(B, 3, H, W\) or without B, got \(1, 1, 32, 32\)"),
        (("VIT", "small.npy"), ValueError, "does not fit .*: Input height"),
        (("VIT", "ids.npy"), ValueError, "reads images, and .*ids.npy holds token ids"),
        (("LLAMA", "ids.npy"), ValueError, "token ids must be from 0 to 299, got 5 to 400"),
        (("LLAMA", "small.npy"), ValueError, "reads text, and .*small.npy holds no integers"),
        (("LLAMA", "binary.bin"), ValueError, "is neither text in UTF-8 nor a file that ends in .png"),
        (("ids.npy", "text"), ValueError, "ids.npy is a file; give the model's name or folder"),
        (("VIT", "empty"), ValueError, "there are no images in"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(lens, llama, vit, picture, tmp_path, arguments, error, message):
    for name in ("broken.png", "broken.npy", "broken.safetensors", "broken.pt"):
        (tmp_path / name).write_bytes(b"\x00\x01broken")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")  # a pickled module could run code
    np.save(tmp_path / "grey.npy", np.zeros((1, 1, 32, 32), np.float32))
    np.save(tmp_path / "small.npy", np.zeros((3, 16, 16), np.float32))
    np.save(tmp_path / "ids.npy", np.array([5, 400]))
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)))
    (tmp_path / "empty").mkdir()
    places = {"LLAMA": llama, "VIT": vit, "PICTURE": picture}
    with pytest.raises(error, match=message):
        lens(*(places.get(a, a) for a in arguments))
    assert not (tmp_path / "page.html").exists()


def folder_of(path, architecture, **arguments):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architecture": architecture, "model_args": arguments}))
    return path


def test_a_model_without_attention_and_one_with_its_own_softmax_are_named(lens, timm, picture, tmp_path):
    with pytest.raises(ValueError, match="ResNet made no attention call"):
        lens(folder_of(tmp_path / "convolutions", "resnet10t"), picture)
    with pytest.raises(ValueError, match="computes its softmax by hand") as caught:
        lens(folder_of(tmp_path / "by_hand", "levit_128s"), picture)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"timm cannot build resnet10t: .*unexpected keyword argument 'heads'"):
        lens(folder_of(tmp_path / "wrong", "resnet10t", heads=3), picture)


def test_windows_are_averaged_and_that_is_said(lens, timm, picture, tmp_path):
    small = dict(img_size=32, patch_size=2, window_size=4, depths=[2, 2], embed_dim=24, num_heads=[2, 4])
    _, page = lens(folder_of(tmp_path / "swin", "swin_tiny_patch4_window7_224", **small), picture, "--no-importance")
    assert [(layer["note"], len(layer["heads"])) for layer in page["layers"]] == [
        *[("mean over 16 windows", 2)] * 2, *[("mean over 4 windows", 4)] * 2,
    ]  # fmt: skip
    assert page["spaces"][0]["count"] == 16 and page["spaces"][0]["grid"] is None  # never guessed


def test_a_corrupt_config_and_a_strange_one(lens, tmp_path):
    for text, message in (("{", "is corrupt"), ("[]", "names neither"), ('{"model_type": "?"}', "transformers cannot")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            lens(tmp_path, "text")


def test_an_error_is_one_line_without_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "attnlab.cli", "lens", "nowhere/model", "x"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "attnlab: model: there is no folder nowhere/model (and nothing is downloaded)\n"
