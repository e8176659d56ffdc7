import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attnlab.arena import task as registry
from attnlab.arena.task import CAUSAL_GRID, GRID, Budget, Task, find_task, task, tasks
from attnlab.arena.tasks import needle, photos, recall, text

NAMES = ("text", "textures", "photos-x2", "series", "recall", "needle", "lookup", "causal-lookup", "pixels")


@pytest.fixture(scope="module")
def ready():
    return {name: find_task(name)("small") for name in NAMES}


def test_the_tasks_of_the_house_are_registered():
    assert tuple(tasks())[: len(NAMES)] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_batches_depend_on_the_generator_alone(ready, name):
    first, again, other = (ready[name].batch(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("name", NAMES)
def test_stem_and_head_fit_batch_and_loss(ready, name):
    it = ready[name]
    inputs, targets = it.batch(torch.Generator().manual_seed(0))
    tokens = it.stem(16)(inputs)
    assert tokens.shape == (it.budget.batch, it.budget.length, 16)
    assert (it.grid(tokens.shape[1]) is not None) == (it.layout in (GRID, CAUSAL_GRID))
    assert it.loss(it.head(16)(tokens), targets).isfinite()


@pytest.mark.parametrize("name", ["text", "series", "recall", "needle", "pixels"])
def test_no_token_of_a_sequence_shows_a_later_one(ready, name):
    it = ready[name]
    inputs, _ = it.batch(torch.Generator().manual_seed(0))
    changed = inputs.clone()
    changed[:, -1] = changed[:, 0]
    stem = it.stem(16)
    assert torch.equal(stem(inputs)[:, :-1], stem(changed)[:, :-1])


def test_text_holds_whole_modules_out(ready):
    train = ready["text"].train.tobytes()
    held_out = ready["text"].held_out.tobytes()
    assert len(train) > 5 * len(held_out) > 500_000
    pieces = [held_out[at : at + 500] for at in range(0, len(held_out) - 500, len(held_out) // 20)]
    assert not any(piece in train for piece in pieces)


def test_text_of_byte_pairs_is_what_a_table_of_counts_knows(ready):
    name, bits = ready["text"].trivial()
    assert name == "byte pairs"
    assert 3.0 < bits < 4.5  # English and code lie there; 8 is chance


def test_text_reads_a_file_of_the_users(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(range(256)) * 400)
    it = find_task("text")("small", path)
    assert len(it.held_out) == 10_240
    (tmp_path / "short.txt").write_bytes(b"abc")
    with pytest.raises(ValueError, match="holds 2 bytes"):
        find_task("text")("small", tmp_path / "short.txt")


def test_textures_hold_the_right_quarter_out(ready, monkeypatch):
    it = ready["textures"]
    columns = np.broadcast_to(np.arange(512, dtype=np.float32), (3, 512, 512))
    monkeypatch.setattr(it, "photographs", columns)
    seen = []
    monkeypatch.setattr("attnlab.arena.tasks.textures._turned", lambda view, turn: seen.append(view) or view.copy())
    it.batch(torch.Generator().manual_seed(0))
    assert max(view.max() for view in seen) < 384
    seen.clear()
    it.evaluate(lambda inputs: torch.zeros(len(inputs), 3))
    assert min(view.min() for view in seen) >= 384


def test_photos_start_from_bicubic(ready):
    it = ready["photos-x2"]
    score = it.evaluate(lambda inputs: torch.zeros(len(inputs), inputs[0, 0].numel(), 4))
    assert score.value == pytest.approx(it.trivial()[1])
    assert (it.head(16)(torch.randn(2, 9, 16)) == 0).all()


def test_photos_miss_what_interpolation_misses():
    image = np.random.default_rng(0).integers(0, 256, (40, 32, 3)).astype(np.uint8)
    missing, low = photos._pair(image)
    grey = torch.from_numpy(image @ np.array([0.299, 0.587, 0.114]) / 255).float()[None, None]
    high = F.interpolate(torch.from_numpy(low)[None, None], scale_factor=2, mode="bicubic")
    torch.testing.assert_close(high + F.pixel_shuffle(torch.from_numpy(missing)[None], 2), grey)


def test_photos_read_a_folder_of_images(tmp_path):
    from matplotlib.image import imsave

    for i in range(3):
        imsave(tmp_path / f"{i}.png", np.random.default_rng(i).random((64, 64, 3)))
    it = find_task("photos-x2")("small", tmp_path)
    assert (len(it.train), len(it.held_out)) == (2, 1)
    assert it.digest() != find_task("photos-x2")("small").digest()
    with pytest.raises(ValueError, match="holds 0 images"):
        find_task("photos-x2")("small", tmp_path.parent / "nothing")


def test_series_never_show_the_future(ready):
    it = ready["series"]
    values, season = next(iter(it.series.values()))
    changed = values.copy()
    changed[200:] += 100.0
    before, _ = it._example(values, season, 200)
    after, _ = it._example(changed, season, 200)
    assert np.array_equal(before, after)


def test_series_without_a_correction_are_seasonal_naive(ready):
    it = ready["series"]
    score = it.evaluate(lambda inputs: torch.zeros(*inputs.shape[:2], 12))
    assert score.value == pytest.approx(it.trivial()[1])
    values, season = it.series["sunspots, yearly"]
    _, missing = it._example(values, season, 250)
    naive = np.concatenate((values[239:250], values[239:240]))  # eleven years back; the twelfth value takes two seasons
    scale = values[250 - it.budget.length : 250].std()
    np.testing.assert_allclose(missing[-1], (values[250:262] - naive) / scale, rtol=1e-5)


def test_pixels_are_predicted_from_those_before(ready):
    inputs, targets = ready["pixels"].batch(torch.Generator().manual_seed(0))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert (inputs[:, 0] == 17).all() and targets.max() <= 16


def test_shades_by_place_are_what_a_table_of_counts_knows(ready):
    it = ready["pixels"]
    counts = torch.tensor(np.stack([np.bincount(c, minlength=17) + 0.1 for c in it.train.T]))
    table = (counts / counts.sum(1, keepdim=True)).log().float()
    guessed = it.evaluate(lambda inputs: table.expand(len(inputs), -1, -1)).value
    assert guessed == pytest.approx(it.trivial()[1], rel=1e-5)


def test_recall_asks_for_values_that_were_shown():
    inputs, targets = recall._dictionaries(torch.Generator().manual_seed(0), 8, 6)
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        shown = dict(zip(row[:12:2], row[1:12:2], strict=True))
        assert len(shown) == 6
        assert wanted[:12] == [-1] * 12
        for key, answer in zip(row[12::2], wanted[12::2], strict=True):
            assert shown[key] == answer + recall._KEYS


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needles_lie_at_the_depth_asked_for(depth):
    inputs, targets = needle._haystacks(torch.Generator().manual_seed(0), 16, 64, depth)
    asked, answers = inputs[:, -8], targets[:, -8]
    place = 2 * round(depth * 27)
    assert torch.equal(inputs[:, place], asked)
    assert torch.equal(inputs[:, place + 1], answers + needle._HAY + needle._MARKS)
    assert ((inputs[:, :-8] == asked[:, None]).sum(1) == 1).all()


@pytest.mark.parametrize("name", ["recall", "needle"])
def test_who_looks_up_every_value_gets_everything_right(ready, name):
    offset = {"recall": recall._KEYS, "needle": needle._HAY + needle._MARKS}[name]

    def look_up(inputs: torch.Tensor) -> torch.Tensor:
        outputs = torch.zeros(*inputs.shape, 32)
        for b, row in enumerate(inputs.tolist()):
            known = {}
            for at in range(0, len(row), 2):
                if known.get(row[at], -1) >= offset:  # what is asked, not hay
                    outputs[b, at, known[row[at]] - offset] = 1
                known.setdefault(row[at], row[at + 1])
        return outputs

    assert ready[name].evaluate(look_up).value == 1.0


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'textures'"):
        find_task("texture")


def test_an_unknown_budget_names_the_known():
    with pytest.raises(ValueError, match="'large' is not one of small, medium"):
        find_task("recall")("large")


def test_a_task_that_reads_nothing_refuses_data(tmp_path):
    with pytest.raises(ValueError, match="brings its own data"):
        find_task("recall")("small", tmp_path)


@pytest.mark.parametrize(("name", "package"), [("series", "statsmodels"), ("textures", "skimage")])
def test_a_missing_package_names_its_extra(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    for module in [m for m in sys.modules if m.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, module)
    sys.modules[find_task(name).__module__].__dict__[
        "_photographs" if name == "textures" else "_statsmodels_series"
    ].cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'attnlab\[data\]'"):
        find_task(name)("small")


def test_a_user_adds_a_task_with_a_decorator(monkeypatch):
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))

    @task
    class Mine(Task):
        name, metric = "mine", "error"
        budgets = {"small": Budget(1000, 1, 1, 1, 8)}

    assert find_task("mine") is Mine
    with pytest.raises(ValueError, match="'text' is taken"):
        task(type("Text", (Task,), {"name": "text", "metric": "", "budgets": {}}))
    with pytest.raises(TypeError, match="lacks metric"):
        task(type("Nothing", (Task,), {"name": "nothing", "budgets": {}}))


def test_the_library_is_read_once():
    assert text._standard_library() is text._standard_library()


@pytest.mark.parametrize("name", ["lookup", "causal-lookup"])
def test_a_dictionary_answers_every_lookup(ready, name):
    inputs, targets = ready[name].batch(torch.Generator().manual_seed(0))
    context, queries = inputs.chunk(2, 1)
    for pairs, asked, answers in zip(context.tolist(), queries.tolist(), targets.tolist(), strict=True):
        known: dict[int, int] = {} if name == "causal-lookup" else dict(pairs)
        for (key, value), (question, _), answer in zip(pairs, asked, answers, strict=True):
            known[key] = value
            assert known[question] == answer
