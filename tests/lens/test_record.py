"""A record: what was kept is found by layer, head, step and call, and comes back from its file."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attnlab.lens import Record
from attnlab.lens.measures.weights import entropy, head_similarity, mean_distance, normalised_entropy, sink_mass
from attnlab.lens.record import Entry
from attnlab.statistics import Statistics


def entry(layer=0, step=0, index=0, nq=4, nk=4, heads=(0, 1, 2), total=3, kind="self", **kept):
    kept = kept or {"": torch.randn(2, len(heads), nq, nk).softmax(-1)}
    return Entry(f"blocks.{layer}.attn", layer, index, step, kind, tuple(heads), total, nq, nk, nk - nq, kept=kept)


def statistics_of(layer=0, nq=4, nk=4, **rest):
    per_query = {n: torch.rand(2, 3, nq) for n in ("entropy", "max", "distance", "sink_mass", "lse")}
    return entry(layer, nq=nq, nk=nk, received=torch.rand(2, 3, nk), **per_query, **rest)


def test_a_layer_is_found_by_ordinal_name_glob_and_from_the_end():
    record = Record("weights", [entry(3), entry(5)])
    third, fifth = (e.kept[""] for e in record.entries)
    assert torch.equal(record[3], third) and torch.equal(record["blocks.3.attn"], third)
    assert torch.equal(record[-1], fifth) and torch.equal(record[-2], third)
    assert torch.equal(record["*.5.*"], fifth)
    assert record.layers == ("blocks.3.attn", "blocks.5.attn") and record.ordinals == (3, 5)
    assert list(record) == list(record.layers) and len(record) == 2
    assert 3 in record and "blocks.5.attn" in record and 4 not in record


def test_a_head_is_found_by_its_number_in_the_model():
    record = Record("weights", [entry(heads=(1, 4), total=6)])
    kept = record.entries[0].kept[""]
    assert torch.equal(record[0, 4], kept[:, 1]) and torch.equal(record[0, -2], kept[:, 1])
    assert torch.equal(record[0, [4, 1]], kept[:, [1, 0]]) and record.heads == (1, 4)


def test_what_was_not_recorded_is_said_with_what_was():
    record = Record("weights", [entry(3, heads=(1, 4), total=6), entry(5, heads=(1, 4), total=6)])
    with pytest.raises(
        ValueError, match=r"layer 4 was not recorded; those that were: 3 blocks.3.attn, 5 blocks.5.attn"
    ):
        record[4]
    with pytest.raises(ValueError, match=r"layer 'head' was not recorded; .*3 blocks.3.attn"):
        record["head"]
    with pytest.raises(ValueError, match=r"layer 'blocks.\*' is several: blocks.3.attn, blocks.5.attn"):
        record["blocks.*"]
    with pytest.raises(ValueError, match=r"heads 2 of blocks.3.attn were not recorded; those that were: 1, 4"):
        record[3, 2]
    with pytest.raises(ValueError, match=r"heads of blocks.3.attn: 6 not there: there are 0 to 5"):
        record[3, 6]
    with pytest.raises(ValueError, match=r"step 2 was not recorded; those that were: 0"):
        record.step(2)
    with pytest.raises(ValueError, match=r"call 1 was not recorded; those that were: 0"):
        record.call(1)
    with pytest.raises(ValueError, match="nothing was recorded"):
        Record("weights")[0]
    with pytest.raises(TypeError, match="a layer is an ordinal or a name, got float"):
        record[1.0]


def test_the_steps_of_a_generation_become_one_matrix():
    steps = [entry(step=0, nq=4, nk=4), entry(step=1, nq=1, nk=5), entry(step=2, nq=2, nk=7)]
    record = Record("weights", steps)
    whole = record[0]
    assert whole.shape == (2, 3, 7, 7)
    for e, rows in zip(steps, (slice(0, 4), slice(4, 5), slice(5, 7)), strict=True):
        assert torch.equal(whole[:, :, rows, : e.nk], e.kept[""]) and (whole[:, :, rows, e.nk :] == 0).all()
        assert torch.equal(record.step(e.step)[0], e.kept[""])
    assert torch.equal(record.step(-1)[0], steps[2].kept[""]) and record.steps == (0, 1, 2)


def test_statistics_of_a_generation_are_those_of_its_one_matrix():
    steps = [statistics_of(), statistics_of(nq=1, nk=5, step=1)]
    found = Record("stats", steps)[0]
    assert isinstance(found, Statistics)
    assert torch.equal(found.entropy, torch.cat([s.kept["entropy"] for s in steps], -1))
    first, second = (s.kept["received"] for s in steps)
    torch.testing.assert_close(found.received[..., :4], first + second[..., :4])
    assert torch.equal(found.received[..., 4], second[..., 4])
    assert Record("stats", steps)[0, 1].entropy.shape == (2, 5)


def test_a_cache_of_fixed_length_is_followed_by_where_its_queries_stand():
    steps = [entry(step=0, nq=4, nk=4), entry(step=1, nq=1, nk=9), entry(step=2, nq=1, nk=9)]
    for e, offset in zip(steps, (0, 4, 5), strict=True):
        e.offset = offset
    assert Record("weights", steps)[0].shape == (2, 3, 6, 9)


def test_one_query_at_a_time_to_the_same_keys_is_one_matrix_too():
    steps = [entry(kind="cross", step=s, nq=1, nk=6) for s in range(3)]
    cached = [entry(1, step=s, nq=1, nk=s + 1) for s in range(3)]
    assert Record("weights", steps)[0].shape == (2, 3, 3, 6)
    assert Record("weights", steps + cached)[0].shape == (2, 3, 3, 6)


def test_one_query_that_pools_each_of_several_inputs_is_not_joined():
    pools = [entry(1, kind="cross", step=s, nq=1, nk=6) for s in range(2)]
    with pytest.raises(ValueError, match=r"passes over blocks.1.attn do not continue each other"):
        Record("weights", [*pools, *(entry(0, step=s, nq=6, nk=6) for s in range(2))])[1]


def test_passes_that_do_not_continue_each_other_are_not_joined():
    record = Record("weights", [entry(step=0), entry(step=1)])
    with pytest.raises(ValueError, match=r"do not continue each other: choose by record.step\(…\) among 0, 1"):
        record[0]
    assert torch.equal(record.step(1)[0], record.entries[1].kept[""])
    again = Record("weights", [entry(index=0), entry(index=1)])
    with pytest.raises(ValueError, match=r"called several times in a pass: choose by record.call\(…\) among 0, 1"):
        again[0]
    assert torch.equal(again.call(1)[0], again.entries[1].kept[""])


def test_layers_of_one_shape_stack_and_others_say_why_not():
    record = Record("weights", [entry(0), entry(1)])
    assert record.stack().shape == (2, 2, 3, 4, 4)
    stats = Record("stats", [statistics_of(0), statistics_of(1)]).stack()
    assert stats.entropy.shape == stats.received.shape == (2, 2, 3, 4)
    assert Record("values", [entry(a=torch.ones(3)), entry(1, a=torch.ones(3))]).stack()["a"].shape == (2, 3)
    with pytest.raises(ValueError, match=r"do not stack: blocks.0.attn \(2, 3, 4, 4\); blocks.1.attn \(2, 3, 9, 9\)"):
        Record("weights", [entry(0), entry(1, nq=9, nk=9)]).stack()


def test_measures_take_a_record_of_weights_or_of_statistics():
    record = Record("weights", [entry(0), entry(1)])
    assert entropy(record).shape == (2, 2, 3, 4) and head_similarity(record).shape == (2, 2, 3, 3)
    assert torch.equal(entropy(record)[1], entropy(record[1]))
    stats = Record("stats", [statistics_of(0), statistics_of(1)])
    assert torch.equal(mean_distance(stats)[1], stats[1].distance)
    assert torch.equal(sink_mass(stats)[0], stats[0].sink_mass)
    with pytest.raises(ValueError, match="mass of the first 1 keys was recorded, not that of 3"):
        sink_mass(stats, 3)
    with pytest.raises(ValueError, match="needs a record of weights"):
        normalised_entropy(stats)


def test_a_grid_cuts_out_its_tokens():
    record = Record("weights", [entry(nq=7, nk=7)], grid=(2, 3))
    values = torch.arange(7.0).expand(2, 7)
    assert torch.equal(record.on_grid(values)[0], torch.arange(1.0, 7).view(2, 3))
    within = Record("weights", [entry()], grid=(2, 3), prefix=2)
    assert torch.equal(within.on_grid(torch.arange(20.0)), torch.arange(2.0, 8).view(2, 3))
    with pytest.raises(ValueError, match=r"grid 2 × 3 does not fit 5 tokens"):
        record.on_grid(torch.ones(5))
    with pytest.raises(ValueError, match=r"grid 2 × 3 does not fit 500 tokens \(more than 16 before it must be said"):
        record.on_grid(torch.ones(500))
    with pytest.raises(ValueError, match="this record has no grid"):
        Record("weights", [entry()]).on_grid(torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_comes_back_from_its_file(tmp_path, dtype):
    shared = torch.randn(2, 3, 4, 4).to(dtype)
    kept = Record(
        "weights", [entry(0, **{"": shared}), entry(1, **{"": shared.mT}), entry(2, heads=(0, 2))],
        tokens=["a", "b", "ç", "<s>"], grid=(2, 2), prefix=0, sinks=2, model="Tiny",
    )  # fmt: skip
    kept.save(tmp_path / "x.safetensors")
    back = Record.load(tmp_path / "x.safetensors")
    for name in kept:
        assert torch.equal(back[name], kept[name]) and back[name].dtype is kept[name].dtype
    for name in ("what", "tokens", "grid", "prefix", "sinks", "model", "layers", "heads", "bytes"):
        assert getattr(back, name) == getattr(kept, name)
    assert repr(back) == repr(kept)


def test_statistics_named_values_and_nothing_come_back_too(tmp_path):
    stats, values = Record("stats", [statistics_of()]), Record("values", [entry(a=torch.ones(3), b=torch.tensor(2))])
    for i, record in enumerate((stats, values, Record("weights"))):
        record.save(tmp_path / f"{i}")
    assert torch.equal(Record.load(tmp_path / "0")[0].entropy, stats[0].entropy)
    assert Record.load(tmp_path / "1")[0]["b"] == 2 and len(Record.load(tmp_path / "2")) == 0


def test_another_file_is_refused_with_what_is_wrong_with_it(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="no such record file"):
        Record.load(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="a safetensors file, but not a record of attention"):
        Record.load(path)
    path.write_bytes(b"not at all")
    with pytest.raises(ValueError, match="damaged, or no safetensors file"):
        Record.load(path)
    Record("weights", [entry()]).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged, or no safetensors file"):
        Record.load(path)
    path.write_bytes(whole)
    own = {"what": "weights", "calls": []}
    for metadata, wrong in (
        ({"version": "2", "record": json.dumps(own)}, "of version 2; known here is 1"),
        ({"version": "1"}, "a damaged record: KeyError"),
        ({"version": "1", "record": "{"}, "a damaged record: JSONDecodeError"),
        ({"version": "1", "record": "[]"}, "a damaged record"),
        ({"version": "1", "record": json.dumps({**own, "calls": [{"kept": [""], "heads": [0]}]})}, "a damaged record"),
    ):
        save_file(load_file(path), tmp_path / "y", {"format": "attnlab.record", **metadata})
        with pytest.raises(ValueError, match=wrong):
            Record.load(tmp_path / "y")


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda own: own.update(what="maps"), "it holds 'maps', not weights, outputs"),
        (lambda own: own["calls"][0].update(layer="x"), "call 0 is not numbered"),
        (lambda own: own["calls"][0].update(nq=9), "holds .* for 3 heads, 9 queries and 4 keys"),
        (lambda own: own["calls"][0].update(heads=[0]), "for 1 heads, 4 queries and 4 keys"),
        (lambda own: own["calls"][0].update(total=2), r"heads \[0, 1, 2\] of 2"),
    ],
)
def test_what_does_not_fit_together_in_a_file_is_said_when_it_is_read(tmp_path, change, wrong):
    path = tmp_path / "x.safetensors"
    Record("weights", [entry()]).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    own = json.loads(metadata["record"])
    change(own)
    save_file(load_file(path), path, {**metadata, "record": json.dumps(own)})
    with pytest.raises(ValueError, match=f"a damaged record: .*{wrong}"):
        Record.load(path)


def test_it_says_what_it_holds():
    record = Record("weights", [entry(0), entry(1)], model="Tiny")
    assert record.bytes == 2 * 2 * 3 * 4 * 4 * 4
    assert repr(record) == "Record(weights of Tiny: 2 layers × 3 heads, 1 step, 4 keys, 768 B)"
    assert "0 layers" in repr(Record("weights"))


def test_a_folder_that_is_not_there_is_named(tmp_path) -> None:
    from attnlab.lens.record import Record

    with pytest.raises(FileNotFoundError, match="no folder for the record file"):
        Record("weights").save(tmp_path / "none" / "record.safetensors")
