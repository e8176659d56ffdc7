"""Scenes are what they say, and the model of them is a LLaVA like any other."""

from __future__ import annotations

import pytest
import torch

from attnlab.lens.toys.scenes import ASK, BEGIN, END, IMAGE, Scenes


def draw(scenes, count=64, **keywords):
    return scenes.draw(count, torch.Generator().manual_seed(0), **keywords)


def test_the_answer_is_the_colour_of_the_shape_in_its_cell():
    scenes = Scenes(noise=0.0, tint=0.5)
    scene = draw(scenes)
    glyphs, tints, side = scenes.glyphs(), scenes.tints(), scenes.patch
    for i in range(len(scene.ids)):
        row, column = divmod(int(scene.cells[i]), scenes.grid[1])
        patch = scene.pixels[i, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
        shape, colour = int(scene.ids[i, -1]) - END - 1, int(scene.answers[i]) - scenes.colour_token(0)
        torch.testing.assert_close(patch, glyphs[shape] * (1 + 0.5 * tints[colour])[:, None, None])
        assert scene.habits[i] == scenes.colour_token(int(scenes.usual()[shape]))


def test_glyphs_and_colours_differ():
    scenes = Scenes()
    glyphs, tints = scenes.glyphs().flatten(1), scenes.tints()
    assert torch.equal(glyphs.sum(1), torch.full((16,), 8.0))
    assert (torch.cdist(glyphs, glyphs) + 9 * torch.eye(16)).min() > 1
    assert (torch.cdist(tints, tints) + 9 * torch.eye(6)).min() > 1


def test_the_habit_is_as_strong_as_was_asked():
    scenes = Scenes(habit=0.8)
    scene = draw(scenes, 4000)
    assert abs(float((scene.answers == scene.habits).float().mean()) - 0.8) < 0.03
    assert not (draw(scenes, habit=0.0).answers == draw(scenes, habit=0.0).habits).any()
    assert torch.equal(draw(scenes, habit=1.0).answers, draw(scenes, habit=1.0).habits)


def test_covered_cells_are_black():
    scenes = Scenes(covered=0.25)
    scene = draw(scenes, 500)
    cells = scene.pixels.view(500, 3, 4, 4, 4, 4).abs().sum((1, 3, 5))
    assert abs(float((cells == 0).float().mean()) - 0.25) < 0.02


def test_earlier_questions_stand_answered_in_the_ids():
    scenes = Scenes()
    scene = draw(scenes, questions=3)
    assert scene.ids.shape == (64, 1 + 16 + 3 * 3 - 1)
    assert (scene.ids[:, 0] == BEGIN).all() and (scene.ids[:, 1:17] == IMAGE).all()
    assert (scene.ids[:, [17, 20, 23]] == ASK).all()
    assert (scene.ids[:, [19, 22]] >= scenes.colour_token(0)).all() and scene.ids.max() < scenes.vocabulary
    shapes = scene.ids[:, [18, 21, 24]]
    assert all(len(set(row.tolist())) == 3 for row in shapes)


def test_the_model_is_saved_and_loaded_like_any_llava(transformers, tmp_path):
    scenes = Scenes()
    model, scene = scenes.llava(dim=32, depth=1).eval(), draw(scenes, 4)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**scene.inputs()).logits, model(**scene.inputs()).logits)


def test_a_few_steps_of_training_learn(transformers):
    scenes = Scenes(noise=0.1)
    model = scenes.llava(dim=32, depth=1)

    def loss():
        scene = draw(scenes, 200)
        with torch.no_grad():
            logits = model(**scene.inputs(), logits_to_keep=1).logits[:, -1]
        return torch.nn.functional.cross_entropy(logits, scene.answers)

    before = loss()
    scenes.train(model, steps=20, batch=16)
    assert loss() < 0.7 * before and not model.training


def test_bad_arguments_are_named(transformers):
    with pytest.raises(ValueError, match="habit must lie in 0 to 1, questions in 1 to 16"):
        draw(Scenes(), questions=17)
    with pytest.raises(ValueError, match="images are square, got a grid of 2 × 4"):
        Scenes(grid=(2, 4)).llava()
