"""The benchmark's own files: each format is read, and what is missing is named."""

import json
import wave
from dataclasses import replace

import numpy as np
import pytest
import torch

from attnlab.arena.bench import cab
from attnlab.arena.task import find_task
from attnlab.arena.tasks.cab import clouds, speech, summaries
from attnlab.arena.tasks.cab.base import PAPER
from attnlab.arena.tasks.cab.clouds import read_points
from attnlab.arena.tasks.cab.forecasts import Lengths, clock, read_table
from attnlab.arena.tasks.cab.sound import Mel
from attnlab.arena.tasks.cab.voices import intervals

PAPER_TASKS = [cls.name for cls in cab.of_budget(PAPER)]


def loaded(name, folder, monkeypatch, **changes):
    cls = find_task(name)
    monkeypatch.setitem(cls.budgets, PAPER, replace(cls.budgets[PAPER], batch=2, **changes))
    it = cls(PAPER, folder)
    inputs, targets = it.batch(torch.Generator().manual_seed(0))
    tokens = it.stem(16)(inputs)
    tokens, *beside = tokens if isinstance(tokens, tuple) else (tokens,)
    assert tokens.shape[1] == it.budget.length
    outputs = it.head(16)(tokens, *beside)
    assert it.loss(outputs, targets).isfinite()
    return it


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_without_data_it_says_which_and_where_from(name):
    with pytest.raises(FileNotFoundError, match=r"reads .* from the folder given with --data-dir: .*https://"):
        find_task(name)(PAPER)


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_a_folder_without_the_files_names_the_missing_one(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"has no \S+.*; the task {name} reads .*https://"):
        find_task(name)(PAPER, tmp_path)


def test_other_sizes_bring_their_own_data(tmp_path):
    with pytest.raises(ValueError, match="reads data at its published size alone"):
        find_task("cab-lm-cs")("cab-tiny", tmp_path)


def test_books_are_read_as_tokens(tmp_path, monkeypatch):
    folder = tmp_path / "pg19"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part in ("train", "valid", "test"):
        lines = [" ".join(f"Ġw{i}" for i in rng.integers(9, size=20)) for _ in range(30)]
        (folder / f"{part}.txt.tokens").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in ("cab-lm-cs", "cab-mlm-ns"):
        it = loaded(name, tmp_path, monkeypatch, length=32)
        assert it.symbols == 9 + 2  # and the unknown, and the end of a line
        assert len(it.train) == 30 * 21
        score = it.evaluate(lambda inputs: torch.zeros(*inputs.shape, 11))
        assert score.value == pytest.approx(11, rel=1e-4)
    (folder / "train.txt.tokens").write_text("a b", encoding="utf-8")
    with pytest.raises(ValueError, match="holds 3 tokens; 34 are wanted"):
        loaded("cab-lm-cs", tmp_path, monkeypatch, length=32)


def test_articles_and_their_summaries_are_read(tmp_path, monkeypatch):
    for part in ("train", "test"):
        (tmp_path / f"{part}.src.cleaned").write_text("A cat sat. NEWLINE_CHAR ||||| It was a cat!\nDogs bark\n")
        (tmp_path / f"{part}.tgt").write_text("– A cat.\nDogs, loud\n", encoding="utf-8")
    monkeypatch.setitem(summaries._SIZES, PAPER, (16, 8, 100))
    lengths = {"cab-sum-ns": 16, "cab-sum-cs": 24, "cab-sum-cc": 48}
    for name, length in lengths.items():
        it = loaded(name, tmp_path, monkeypatch, length=length)
        assert it.held_out[0][0][:4] == ["a", "cat", "sat", "."]
        assert "newline_char" not in it.vocabulary.words
    (tmp_path / "test.tgt").write_text("one line\n")
    with pytest.raises(ValueError, match=r"test\.tgt 1; as many are wanted"):
        loaded("cab-sum-cs", tmp_path, monkeypatch, length=24)


def test_faces_are_read(tmp_path, monkeypatch):
    image = pytest.importorskip("matplotlib.image")
    rng = np.random.default_rng(0)
    for name in ("ffhq_16_128", "celebahq_16_128"):
        for kind in ("hr_128", "sr_16_128"):
            (tmp_path / name / kind).mkdir(parents=True)
            for i in range(2):
                image.imsave(
                    tmp_path / name / kind / f"{i:05}.png", rng.integers(256, size=(16, 16, 3)).astype(np.uint8)
                )
    it = loaded("cab-sr-ns", tmp_path, monkeypatch, length=64)
    assert it.train[0].shape == (2, 3, 16, 16)
    (tmp_path / "ffhq_16_128/hr_128/00001.png").unlink()
    with pytest.raises(ValueError, match="pairs of 16×16 images are wanted"):
        loaded("cab-sr-ns", tmp_path, monkeypatch, length=64)


def test_recordings_and_their_alignments_are_read(tmp_path, monkeypatch):
    folder = tmp_path / "LJSpeech-1.1"
    (folder / "wavs").mkdir(parents=True)
    (folder / "TextGrid").mkdir()
    names = ("LJ001-0001", "LJ001-0002", "LJ049-0001")
    (folder / "metadata.csv").write_text("".join(f"{name}|Ab.|Ab.\n" for name in (*names, "LJ001-0003")))
    tier = '{}xmin = 0.0\n xmax = 0.05\n text = "{}"\n xmin = 0.05\n xmax = 0.2\n text = "{}"\n'
    for i, name in enumerate(names):  # the fourth has no alignment
        with wave.open(str(folder / "wavs" / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes((3000 * np.sin(np.arange(1600) * (i + 1) / 9)).astype("<i2").tobytes())
        words = tier.format('item [1]:\n name = "words"\n', "ab", "")
        (folder / "TextGrid" / f"{name}.TextGrid").write_text(
            words + tier.format('item [2]:\n name = "phones"\n', "AE1", "B")
        )
    assert intervals(words + tier.format('item [2]:\n name = "phones"\n', "AE1", "B")) == [
        (0, 0.05, "AE1"),
        (0.05, 0.2, "B"),
    ]
    monkeypatch.setitem(speech._FRAMES, PAPER, 32)
    monkeypatch.setitem(speech._MELS, PAPER, Mel(8000, 256, 100, 16))
    for name, length in (("cab-tts-ns", 32), ("cab-tts-encoder-ns", 8), ("cab-tts-cs", 8), ("cab-tts-cc", 16)):
        it = loaded(name, tmp_path, monkeypatch, length=length)
        assert (len(it.train.phones), len(it.held_out.phones), it.symbols) == (2, 1, 3)
        assert it.train.phones[0].tolist() == [1] * 4 + [2] * 12 + [0] * 16  # 12.5 ms each, then silence
    monkeypatch.setitem(speech._MELS, PAPER, Mel(16_000, 512, 200, 16))
    with pytest.raises(ValueError, match="must have 16000 samples a second"):
        loaded("cab-tts-ns", tmp_path, monkeypatch, length=32)


def test_clouds_are_read_in_every_format(tmp_path):
    points = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    head = "# .PCD v.7\nFIELDS x y z i\nSIZE 4 4 4 1\nTYPE F F F U\nCOUNT 1 1 1 1\nWIDTH 5\nHEIGHT 1\nPOINTS 5\n"
    lines = "".join(f"{x:.9g} {y:.9g} {z:.9g} 7\n" for x, y, z in points.tolist())
    (tmp_path / "ascii.pcd").write_text(f"{head}DATA ascii\n{lines}")
    row = np.zeros(5, [("p", "<f4", 3), ("i", "u1")])
    row["p"] = points
    (tmp_path / "binary.pcd").write_bytes(f"{head}DATA binary\n".encode() + row.tobytes())
    np.save(tmp_path / "array.npy", points)
    np.savez(tmp_path / "array.npz", points=points)
    for name in ("ascii.pcd", "binary.pcd", "array.npy", "array.npz"):
        np.testing.assert_allclose(read_points(tmp_path / name), points, rtol=1e-6)
    (tmp_path / "small.pcd").write_bytes(f"{head}DATA binary_compressed\n".encode())
    with pytest.raises(ValueError, match="must hold ascii or binary points, got DATA binary_compressed"):
        read_points(tmp_path / "small.pcd")
    (tmp_path / "none.pcd").write_text("nothing")
    with pytest.raises(ValueError, match="no line DATA"):
        read_points(tmp_path / "none.pcd")


def test_models_are_read_with_their_views(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    categories = [{"taxonomy_id": "0269", "train": ["a"], "val": [], "test": ["b"]}]
    (tmp_path / "PCN.json").write_text(json.dumps(categories))
    for part, model in (("train", "a"), ("test", "b")):
        for place in (f"{part}/partial/0269/{model}", f"{part}/complete/0269"):
            (tmp_path / place).mkdir(parents=True)
        np.save(tmp_path / f"{part}/complete/0269/{model}.npy", rng.normal(size=(96, 3)))
        for view in range(3):
            np.save(tmp_path / f"{part}/partial/0269/{model}/{view:02}.npy", rng.normal(size=(20, 3)))
    monkeypatch.setitem(clouds._SIZES, PAPER, (32, 16, 24, 4))
    it = loaded("cab-pcc-nc", tmp_path, monkeypatch, length=40)
    assert it.train[0].shape == (3, 32, 3)  # three views of one model
    assert it.held_out[1].shape == (1, 96, 3)


@pytest.mark.parametrize(("name", "columns"), [("cab-etth1-m-nc", 7), ("cab-etth1-s-nc", 1), ("cab-ecl-m-nc", 321)])
def test_tables_are_read_scaled_and_split_as_informer_does(tmp_path, monkeypatch, name, columns):
    cls = find_task(name)
    hours = 14_400 if cls.months else 400
    names = ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"] if cls.months else [f"MT_{i:03}" for i in range(321)]
    values = np.arange(hours)[:, None] * np.arange(1, len(names) + 1)
    stamps = np.datetime64("2016-07-01T00:00:00") + np.arange(hours) * np.timedelta64(1, "h")
    lines = (",".join(map(str, (str(t).replace("T", " "), *row))) for t, row in zip(stamps, values, strict=True))
    (tmp_path / cls.file).write_text("\n".join(["date," + ",".join(names), *lines, ""]))
    monkeypatch.setattr(cls, "published", Lengths(16, 8, 12))
    it = loaded(name, tmp_path, monkeypatch, length=36)
    assert it.values.shape == (hours, columns)
    # Twelve, four and four months of thirty days; else seven, one and two tenths.
    assert (it.train_until, it.test_from, it.end) == ((8640, 11520, 14400) if cls.months else (280, 320, 400))
    np.testing.assert_allclose(it.values[: it.train_until].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(it.values[: it.train_until].std(0), 1, atol=1e-4)
    (tmp_path / cls.file).write_text("date,A\n2016-07-01 00:00:00,1\n")
    with pytest.raises(ValueError, match=f"must have a date, {cls.columns - 1} columns and {cls.target}, got A"):
        loaded(name, tmp_path, monkeypatch, length=36)


def test_a_date_is_told_by_its_clock(tmp_path):
    (tmp_path / "t.csv").write_text("date,v\n2016-12-31 23:00:00,5\n")
    names, dates, values = read_table(tmp_path / "t.csv")
    assert (names, values.tolist()) == (["v"], [[5.0]])
    np.testing.assert_allclose(dates, [[0.5, 5 / 6 - 0.5, 0.5, 0.5]])  # a Saturday
    assert clock([]).size == 0
    (tmp_path / "t.csv").write_text("time,v\n")
    with pytest.raises(ValueError, match=r"first column .* must be 'date'"):
        read_table(tmp_path / "t.csv")
