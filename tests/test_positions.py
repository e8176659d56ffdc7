"""Positions against independent transcriptions, written with loops in float64."""

from __future__ import annotations

import cmath
import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from attnlab import attend
from attnlab.positions import (
    NTK,
    ALiBi,
    BucketBias,
    Learned,
    Linear,
    Llama3,
    Rotary,
    RotaryGrid,
    Scaling,
    TableBias,
    YaRN,
    alibi_slopes,
    buckets,
)


def heads(n: int, dim: int = 8, batch: int = 2, count: int = 3) -> Tensor:
    return torch.randn(batch, count, n, dim, dtype=torch.float64)


def turned_by_hand(x: Tensor, positions: list[float], angle: list[float], interleaved: bool) -> Tensor:
    """Each pair as a complex number, times e^(i·position·angle)."""
    out, pairs = x.clone(), len(angle)
    for n, position in enumerate(positions):
        for p in range(pairs):
            a, b = (2 * p, 2 * p + 1) if interleaved else (p, p + pairs)
            turned = torch.complex(x[..., n, a], x[..., n, b]) * cmath.exp(1j * position * angle[p])
            out[..., n, a], out[..., n, b] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "base"), [(8, 10000.0), (4, 500.0)])
def test_rotary_turns_pairs_as_complex_numbers_and_leaves_the_rest(dim: int, base: float, interleaved: bool) -> None:
    x = heads(5)
    angle = [base ** (-2 * p / dim) for p in range(dim // 2)]
    q, k = Rotary(8, dim=dim, base=base, interleaved=interleaved)(x, x[:, :1], 3)
    wanted = turned_by_hand(x, [3, 4, 5, 6, 7], angle, interleaved)
    torch.testing.assert_close(q, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(k, wanted[:, :1], rtol=1e-12, atol=1e-12)
    assert torch.equal(q[..., dim:], x[..., dim:])


def test_rotary_scores_depend_on_distance_alone() -> None:
    rotary, q, k = Rotary(8), heads(1), heads(1)
    near = rotary.turn(q, 7) @ rotary.turn(k, 4).mT
    far = rotary.turn(q, 9007) @ rotary.turn(k, 9004).mT
    torch.testing.assert_close(near, far, rtol=1e-9, atol=1e-9)


def test_rotary_pieces_and_given_positions_equal_the_whole() -> None:
    rotary, x = Rotary(8), heads(300)
    whole = rotary.turn(x)
    pieces = [rotary.turn(p, o) for p, o in zip(x.split([1, 99, 200], 2), (0, 1, 100), strict=True)]
    assert torch.equal(torch.cat(pieces, 2), whole)
    assert torch.equal(rotary.turn_to(x, torch.arange(300)), whole)
    order = torch.randperm(300)
    assert torch.equal(rotary.turn_to(x[:, :, order], order), whole[:, :, order])


def test_rotary_angles_are_exact_far_out_in_float32() -> None:
    x = torch.randn(1, 1, 1, 8)
    far = Rotary(8).turn(x, 1_000_003)
    torch.testing.assert_close(far, Rotary(8).turn(x.double(), 1_000_003).float(), rtol=1e-6, atol=1e-6)


def test_rotary_table_may_be_made_in_inference_mode_and_used_in_training() -> None:
    rotary = Rotary(8)
    with torch.inference_mode():
        rotary.turn(torch.randn(1, 1, 4, 8))
    x = torch.randn(1, 1, 4, 8, requires_grad=True)
    rotary.turn(x).sum().backward()
    assert x.grad is not None


def test_rotary_has_no_state_and_can_be_copied() -> None:
    rotary, x = Rotary(8, scaling=YaRN(4.0)), heads(6)
    whole = rotary.turn(x)
    assert not rotary.state_dict()
    for other in (copy.deepcopy(rotary), pickle.loads(pickle.dumps(rotary))):
        assert torch.equal(other.turn(x), whole)


def stretched_by_hand(scaling: Scaling, dim: int, base: float) -> list[float]:
    angles = []
    for p in range(dim // 2):
        angle = base ** (-2 * p / dim)
        if isinstance(scaling, Linear):
            angle /= scaling.factor
        elif isinstance(scaling, NTK):
            angle = (base * scaling.factor ** (dim / (dim - 2))) ** (-2 * p / dim)
        elif isinstance(scaling, YaRN):

            def pair_of(turns: float) -> float:
                # base^(-2p/dim) · trained = 2π · turns, solved for p
                return dim / 2 * math.log(scaling.trained / (2 * math.pi * turns), base)

            low, high = math.floor(pair_of(scaling.fast)), math.ceil(pair_of(scaling.slow))
            ramp = min(max((p - max(low, 0)) / (min(high, dim - 1) - max(low, 0)), 0.0), 1.0)
            angle = angle * (1 - ramp) + angle / scaling.factor * ramp
        elif isinstance(scaling, Llama3):
            wavelength = 2 * math.pi / angle
            if wavelength > scaling.trained / scaling.low:
                angle /= scaling.factor
            elif wavelength >= scaling.trained / scaling.high:
                smooth = (scaling.trained / wavelength - scaling.low) / (scaling.high - scaling.low)
                angle = (1 - smooth) * angle / scaling.factor + smooth * angle
        angles.append(angle)
    return angles


@pytest.mark.parametrize("scaling", [Linear(4.0), NTK(8.0), YaRN(16.0, trained=2048), Llama3(32.0)], ids=str)
def test_stretched_frequencies_follow_their_formulas(scaling: Scaling) -> None:
    wanted = torch.tensor(stretched_by_hand(scaling, 64, 10000.0), dtype=torch.float64)
    torch.testing.assert_close(scaling.frequencies(64, 10000.0), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [NTK, YaRN, Llama3])
def test_stretching_keeps_the_fastest_pair_and_slows_the_slowest_by_the_factor(kind: type[Scaling]) -> None:
    plain, stretched = Linear(1.0).frequencies(128, 10000.0), kind(8.0).frequencies(128, 10000.0)
    assert stretched[0] == pytest.approx(plain[0].item())
    assert stretched[-1] == pytest.approx(plain[-1].item() / 8)


def test_yarn_enlarges_scores_by_its_temperature() -> None:
    x = heads(4)
    plain = Rotary(8, frequencies=YaRN(4.0).frequencies(8, 10000.0).tolist()).turn(x)
    torch.testing.assert_close(Rotary(8, scaling=YaRN(4.0)).turn(x), plain * (0.1 * math.log(4.0) + 1))


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_stretched_frequencies_equal_those_of_transformers(kind: str, transformers) -> None:
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    config = transformers.LlamaConfig(
        hidden_size=512, num_attention_heads=8, max_position_embeddings=8192,
        rope_scaling=dict(rope_type=kind, factor=4.0, rope_theta=10000.0, original_max_position_embeddings=2048,
                          low_freq_factor=1.0, high_freq_factor=4.0),
    )  # fmt: skip
    wanted, magnitude = utils.ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    ours = {"linear": Linear(4.0), "yarn": YaRN(4.0, trained=2048), "llama3": Llama3(4.0, trained=2048)}[kind]
    torch.testing.assert_close(ours.frequencies(64, 10000.0).float(), wanted)
    assert ours.magnitude() == pytest.approx(magnitude)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("grid", [(3, 4), (2, 3, 2)])
def test_grid_rotation_turns_each_share_by_its_coordinate(grid: tuple[int, ...], interleaved: bool) -> None:
    share = 4
    dim, tokens = share * len(grid), math.prod(grid)
    x = heads(1 + tokens, dim)
    turned, _ = RotaryGrid(dim, axes=len(grid), base=100.0, interleaved=interleaved, prefix=1)(x, x, grid=grid)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    angle = [100.0 ** (-2 * p / share) for p in range(share // 2)]
    for token in range(tokens):
        rest, place = token, []
        for size in reversed(grid):
            rest, at = divmod(rest, size)
            place.insert(0, at)
        for axis, at in enumerate(place):
            channels = slice(axis * share, (axis + 1) * share)
            one = x[:, :, 1 + token : 2 + token, channels]
            wanted = turned_by_hand(one, [at], angle, interleaved)
            torch.testing.assert_close(turned[:, :, 1 + token : 2 + token, channels], wanted, rtol=1e-12, atol=1e-12)


def test_alibi_slopes_are_the_papers() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    # The authors' rule for 12 heads: those of 8, then every other one of 16.
    wanted = [2.0**-i for i in range(1, 9)] + [2.0 ** (-0.5 * i) for i in (1, 3, 5, 7)]
    assert alibi_slopes(12).tolist() == pytest.approx(wanted, rel=1e-12)
    assert alibi_slopes(1).tolist() == [2.0**-8]


@pytest.mark.parametrize("signed", [False, True])
def test_alibi_penalises_distance_from_the_offset_on(signed: bool) -> None:
    q, k, v = heads(3), heads(7), heads(7)
    ours = attend(q, k, v, bias=ALiBi(3, signed=signed).bias(3, 7, offset=4), backend="reference")
    slopes, out = alibi_slopes(3), torch.zeros_like(ours)
    for h in range(3):
        for i in range(3):
            scores = [q[:, h, i] @ k[b, h].T / math.sqrt(8) for b in range(2)]
            distance = torch.tensor([float(j - (i + 4)) for j in range(7)], dtype=torch.float64)
            penalty = slopes[h] * (distance if signed else -distance.abs())
            for b in range(2):
                out[b, h, i] = (scores[b][b] + penalty).softmax(0) @ v[b, h]
    torch.testing.assert_close(ours, out, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", [(6,), (2, 3), (2, 2, 3)])
def test_table_bias_has_a_row_per_displacement(window: tuple[int, ...]) -> None:
    position = TableBias(window, 3).double()
    n = math.prod(window)
    places = torch.cartesian_prod(*(torch.arange(w) for w in window)).reshape(n, -1)
    row = position.bias(n, n).row(torch.arange(n)[:, None], torch.arange(n))
    seen: dict[tuple[int, ...], int] = {}
    for i in range(n):
        for j in range(n):
            displacement = tuple((places[i] - places[j]).tolist())
            assert seen.setdefault(displacement, int(row[i, j])) == row[i, j]
    assert len(set(seen.values())) == len(seen) == len(position.table)


def test_table_bias_orders_its_rows_as_swin_does() -> None:
    """Swin's `relative_position_index`: (row displacement + H − 1)·(2W − 1) + column displacement + W − 1."""
    row = TableBias((7, 7), 1).bias(49, 49).row
    for i, j in ((0, 0), (0, 48), (48, 0), (10, 33), (33, 10)):
        down, right = i // 7 - j // 7, i % 7 - j % 7
        assert int(row(torch.tensor(i), torch.tensor(j))) == (down + 6) * 13 + right + 6


@pytest.mark.parametrize("make", [lambda: TableBias((2, 4), 3), lambda: BucketBias(3, count=8, limit=16)])
def test_learned_biases_train_like_the_same_bias_as_a_tensor(make) -> None:
    position, x = make().double(), heads(8)
    bias = position.bias(8, 8)
    lookup = attend(x, x, x, bias=bias).pow(2).sum()
    tensor = attend(x, x, x, bias=position.table[bias.row(torch.arange(8)[:, None], torch.arange(8))].movedim(-1, 0))
    (ours,), (wanted,) = (torch.autograd.grad(y, position.table) for y in (lookup, tensor.pow(2).sum()))
    torch.testing.assert_close(ours, wanted)


def bucket_by_hand(distance: int, count: int, limit: int, causal: bool) -> int:
    first = 0
    if causal:
        distance = max(distance, 0)
    else:
        count //= 2
        first, distance = (count if distance < 0 else 0), abs(distance)
    exact = count // 2
    if distance < exact:
        return first + distance
    log = math.log(distance / exact) / math.log(limit / exact)
    return first + min(exact + int(log * (count - exact)), count - 1)


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_are_exact_near_and_logarithmic_far(causal: bool) -> None:
    # 16, 32 and 64 lie on borders, where float32 rounding decides in T5 and in ours alike.
    distances = [d for d in range(-200, 200) if abs(d) not in (16, 32, 64)]
    ours = buckets(torch.tensor(distances), causal=causal)
    assert ours.tolist() == [bucket_by_hand(d, 32, 128, causal) for d in distances]
    assert int(buckets(torch.tensor(10**6), causal=causal)) == (31 if causal else 15)


def test_learned_vectors_follow_the_offset_and_end_at_the_table() -> None:
    learned, x = Learned(5, 4), torch.zeros(2, 3, 4)
    assert torch.equal(learned(x, 2)[0], learned.table[2:5])
    with pytest.raises(ValueError, match="5 places, and 6 tokens"):
        learned(x, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Rotary(7), "dim must be even"),
        (lambda: Rotary(8, dim=10), "between 2 and head_dim"),
        (lambda: Rotary(8, base=0), "base must be positive"),
        (lambda: Rotary(8, frequencies=[1.0]), "frequencies must be 4"),
        (lambda: Rotary(8).turn(torch.zeros(1, 1, 2, 6)), "head dimension 8"),
        (lambda: Linear(0.5), "factor must be at least 1"),
        (lambda: RotaryGrid(6), "multiple of 2·axes = 4"),
        (lambda: RotaryGrid(8).turn(torch.zeros(1, 1, 5, 8), (2, 2)), "multiply to 5"),
        (lambda: RotaryGrid(8)(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)), "grid must have 2 axes"),
        (lambda: alibi_slopes(0), "heads must be at least 1"),
        (lambda: TableBias((), 2), "window must be"),
        (lambda: TableBias((2, 2), 2).bias(5, 5), "4 places, got 5"),
        (lambda: BucketBias(2, count=3), "count must be even"),
    ],
)
def test_errors_name_what_is_wrong(wrong, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
