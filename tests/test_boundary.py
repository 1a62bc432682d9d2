"""Boundary: both ends agree on every byte, whatever the codec, the memory and the tensor."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from commlib import stamp
from commlib.boundary import Boundary
from commlib.scheme import DTYPES, Role, Scheme
from tests.boundaries import Told, agree, ends, play, same, send, steps
from tests.contract import data

CODECS = ("fp32", "bf16", "fp8", "int8", "int3", "int2:round=stochastic", "sign", "natural")
CODECS += ("int4:block=32", "qsgd:levels=127", "sign:block=tensor")
MODES = ("", "+delta", "+delta:store=disk", "+reuse", "+reuse:first=coded", "+lep:dtype=bf16")
SHAPES = ((4, 70), (1, 3, 5), (2, 0), (0, 7), (3,))


def allowed(codec: str, mode: str) -> bool:
    try:
        Scheme.parse(codec + mode).resolve(Role.ACTIVATION)
    except ValueError:  # a residual that would grow
        return False
    return True


PAIRS = [codec + mode for codec in CODECS for mode in MODES if allowed(codec, mode)]


def test_few_pairs_are_refused() -> None:
    assert len(PAIRS) == len(CODECS) * len(MODES) - 1


@pytest.mark.parametrize("text", PAIRS)
def test_both_ends_agree_after_every_step(text: str) -> None:
    for dtype in DTYPES:
        for shape in SHAPES:
            pair = ends(text, shape, dtype)
            for told in steps(5, shape, dtype):
                arrived = play(pair, told)
                assert agree(pair)
                for x, out in zip(told.tensors, arrived, strict=True):
                    assert out.shape == x.shape
                    assert out.isfinite().all()
                    if text.startswith("fp32") and "delta" not in text and "reuse" not in text:
                        assert same(out, x)
            # Codecs that decode with random numbers would find the same ones at both ends.
            sent, came = (end.state_dict()["compressor"]["steps"] for end in pair)
            assert sent == came


@pytest.mark.parametrize("text", ["int4", "int4+lep", "int4+delta", "int4+reuse", "sign+reuse"])
def test_sizes_are_those_of_codes_scales_raw_rows_and_the_stamp(text: str) -> None:
    pair = ends(text, (4, 70))
    codes, raw, scales = {"int4": (48, 288, 16), "sign": (48, 1120, 16)}[text.split("+")[0]]
    whole = {"int4": 144, "sign": 48}[text.split("+")[0]] + 16 + stamp.BYTES
    sizes = []
    for told in steps(4, (4, 70), torch.float32):
        for end in pair:
            end.begin(told.samples, told.fresh)
        sizes.append([end.nbytes(m) for end in pair for m in range(2)])
        for m, x in enumerate(told.tensors):
            send(pair, x, m)
    if text == "int4+delta":  # rows of 280 bytes, coded 35 and a scale
        assert sizes == [[4 * raw + stamp.BYTES] * 4] * 3 + [[4 * codes + scales + 16] * 4]
    elif "+reuse" in text:
        assert sizes == [[1120 + stamp.BYTES] * 4, [whole] * 4] * 2
    else:
        assert sizes == [[whole] * 4] * 4


def odd(dtype: torch.dtype) -> torch.Tensor:
    """Signed zeros, subnormals, the largest numbers."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, info.tiny / 4, -info.tiny, info.max, -info.max, 1 / 3, -1.0]
    return torch.tensor(values, dtype=dtype).view(2, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ["int2+delta", "int2+delta:store=disk", "int2+reuse"])
def test_a_first_visit_is_raw_bit_for_bit(text: str, dtype: torch.dtype) -> None:
    x = odd(dtype)
    pair = ends(text, (2, 4), dtype)
    out = play(pair, Told([[1, 2]], True, [x]))[0]
    assert same(out, x)
    # One known sample beside a new one.
    if "delta" in text:
        out = play(pair, Told([[2, 3]], True, [x]))[0]
        assert same(out[1], x[1])
    assert agree(pair)


def test_as_many_visits_are_raw_as_the_mode_says() -> None:
    """Every sample by its own count, beside samples that are coded already."""
    pair, x = ends("int2+delta:raw=2", (2, 64)), data("random", 128).view(2, 64)
    exact = []
    for ids in ([1, 2], [1, 3], [1, 3], [1, 3]):
        x = x * 0.5
        for end in pair:
            end.begin([ids])
        arrived = send(pair, x, 0)
        exact.append([same(row, sent) for row, sent in zip(arrived, x, strict=True)])
        assert agree(pair)
    assert exact == [[True, True], [True, True], [False, True], [False, False]]


def test_a_raw_visit_that_is_not_finite_leaves_the_reference_of_the_one_before() -> None:
    pair, x = ends("int2+delta:raw=3", (2, 64)), data("random", 128).view(2, 64)
    sick = x.clone()
    sick[0] *= float("inf")
    for sent in (x, sick):
        for end in pair:
            end.begin([[1, 2]])
        send(pair, sent, 0)
    kept = torch.empty(2, 64)
    references = pair[1]._references
    assert references is not None
    references.read([1, 2], kept)
    assert same(kept, x)
    assert agree(pair)


@pytest.mark.parametrize("text", ["int2+delta", "int2+reuse", "sign+reuse:first=coded"])
def test_what_stays_arrives_ever_more_exactly(text: str) -> None:
    pair, x = ends(text, (4, 70)), data("random", 280).view(4, 70)
    errors = []
    for step in range(40):
        first = step == 0
        out = play(pair, Told([[1, 2, 3, 4]], first, [x + 0.1 * first]))[0]
        errors.append(float((out - x).norm() / x.norm()))
    assert errors[-1] < 0.5 * errors[2]
    assert agree(pair)


@pytest.mark.parametrize("text", ["int4+delta", "int4+reuse", "int4+reuse:first=coded"])
def test_what_is_not_finite_arrives_and_leaves_references_alone(text: str) -> None:
    pair = ends(text, (2, 300))
    x = data("random", 600).view(2, 300)
    clean = Told([[1, 2]], True, [x])
    play(pair, clean)
    before = [end.checksum() for end in pair]
    stays = clean._replace(fresh=False)
    bad = x.clone()
    bad[0, 5], bad[0, 200], bad[1, 299] = float("nan"), float("inf"), -float("inf")
    sick = play(pair, stays._replace(tensors=[bad]))[0]
    assert agree(pair)
    assert sick.isnan().any(dim=1).all()
    assert sick[0, 5].isnan() and sick[0, 200].isnan() and sick[1, 299].isnan()  # noqa: PT018
    whole = torch.full_like(x, float("nan"))
    middle = [end.checksum() for end in pair]
    assert play(pair, stays._replace(tensors=[whole]))[0].isnan().all()
    assert [end.checksum() for end in pair] == middle
    assert middle != before or "raw" not in text
    out = play(pair, stays)[0]
    assert out.isfinite().all()
    assert (out - x).norm() < 0.2 * x.norm()


@pytest.mark.parametrize("text", ["int4+delta", "int4+reuse"])
def test_a_first_visit_that_is_not_finite_leaves_a_finite_reference(text: str) -> None:
    pair = ends(text, (1, 300))
    bad = data("random", 300).view(1, 300).clone()
    bad[0, 5], bad[0, 6] = float("nan"), float("inf")
    out = play(pair, Told([[1]], True, [bad]))[0]
    assert out[0, 5].isnan()
    assert out[0, 6].isinf()
    x = data("random", 300).view(1, 300)
    out = play(pair, Told([[1]], False, [x]))[0]
    assert agree(pair)
    assert (out - x).abs().max() < 0.5


@pytest.mark.parametrize("codec", ["int4", "int2:round=nearest", "sign", "fp8"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_lep_loses_nothing_in_the_sum(codec: str, dtype: str) -> None:
    pair = ends(f"{codec}+lep:dtype={dtype}", (4, 70))
    total, came = torch.zeros(4, 70, dtype=torch.float64), torch.zeros(4, 70, dtype=torch.float64)
    for told in steps(6, (4, 70), torch.float32):
        for x, out in zip(told.tensors, play(pair, told), strict=True):
            total, came = total + x, came + out
    (rest,) = pair[0].state_dict()["compressor"]["residuals"].values()
    assert pair[1].memory_bytes() == 0
    if dtype == "fp32":
        torch.testing.assert_close(came + rest.view(4, 70), total, rtol=0, atol=1e-4)
    left = (total - came).norm() / total.norm()
    apart = ends(codec, (4, 70))
    alone = sum(
        (out.double() - x).norm()
        for told in steps(6, (4, 70), torch.float32)
        for x, out in zip(told.tensors, play(apart, told), strict=True)
    )
    assert left * total.norm() < alone


def test_what_a_boundary_does_not_take() -> None:
    scheme = Scheme.parse("int4+delta")
    with pytest.raises(ValueError, match="would add the residual of one sample to the next; use"):
        Boundary("a", Scheme.parse("int4+ef"), (4, 4), torch.float32)
    with pytest.raises(ValueError, match="float64 tensors travel raw; coded are float32, float16"):
        Boundary("a", scheme, (4, 4), torch.float64)
    with pytest.raises(ValueError, match="a tensor without dimensions has no samples"):
        Boundary("a", scheme, (), torch.float32)
    with pytest.raises(ValueError, match="cap=8 has no room for one sample of 4 values"):
        Boundary("a", Scheme.parse("int4+delta:cap=8"), (4, 4), torch.float32)
    for text in ("qsgd:block=tensor+delta", "qsgd:block=tensor+reuse"):
        with pytest.raises(ValueError, match="diverges"):
            Boundary("a", Scheme.parse(text), (2, 4096), torch.float32)
        Boundary("a", Scheme.parse(text), (2, 16), torch.float32)


def test_begin_says_what_is_missing_and_changes_nothing() -> None:
    delta, reuse = ends("int4+delta", (2, 8))[0], ends("int4+reuse", (2, 8))[0]
    x, wire = torch.ones(2, 8), torch.zeros(80, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"micro-batch 0 of a step of 0; begin\(samples\) names"):
        delta.encode(x, wire)
    with pytest.raises(ValueError, match=r"begin\(fresh=...\) comes before"):
        reuse.encode(x, wire)
    before = [(end.history(), end.checksum()) for end in (delta, reuse)]
    with pytest.raises(ValueError, match="a step needs the ids of its samples"):
        delta.begin()
    with pytest.raises(ValueError, match="micro-batch 1 has 3 sample ids for 2 samples"):
        delta.begin([[1, 2], [3, 4, 5]])
    with pytest.raises(ValueError, match="sample 2 stands twice in one step"):
        delta.begin([[1, 2], [2, 3]])
    with pytest.raises(TypeError):
        delta.begin([[1.5, 2]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="a step needs fresh=True or False"):
        reuse.begin()
    with pytest.raises(ValueError, match="the first step's batch is fresh, got fresh=False"):
        reuse.begin(fresh=False)
    assert [(end.history(), end.checksum()) for end in (delta, reuse)] == before
    delta.begin(torch.tensor([[1, 2], [3, 4]]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="micro-batch 2 of a step of 2"):
        delta.nbytes(2)
    with pytest.raises(ValueError, match="micro-batch -1 of a step of 2"):
        delta.nbytes(-1)


def test_a_batch_that_stays_stays_whole() -> None:
    pair = ends("int4+reuse", (2, 8))
    play(pair, Told([], True, [torch.ones(2, 8)] * 2))
    for end in pair:
        end.begin(fresh=False)
    with pytest.raises(ValueError, match=r"micro-batch 2 was not sent .* fresh, only \[0, 1\]"):
        pair[0].nbytes(2)
    play(pair, Told([], True, [torch.ones(2, 8)]))  # a smaller batch: the old one is forgotten
    assert pair[0].memory_bytes() == pair[1].memory_bytes() == 64
    for end in pair:
        end.begin(fresh=False)
    with pytest.raises(ValueError, match=r"micro-batch 1 was not sent .* fresh, only \[0\]"):
        pair[1].nbytes(1)


def test_wrong_tensors_are_refused_before_anything_changes() -> None:
    sender, receiver = ends("int4", (2, 8))
    wire = torch.zeros(sender.nbytes(), dtype=torch.uint8)
    before = sender.history()
    for x in (torch.ones(2, 9), torch.ones(2, 8, dtype=torch.bfloat16)):
        with pytest.raises(
            ValueError, match=r"'blocks.3': x is .* this boundary's tensor \(2, 8\)"
        ):
            sender.encode(x, wire)
        with pytest.raises(ValueError, match=r"'blocks.3': out is .* this boundary's"):
            receiver.decode(wire, x)
    for bad in (wire[:-1], wire.view(torch.int8), wire.view(2, -1)):
        with pytest.raises(ValueError, match=r"a wire of 48 bytes \(uint8\), got"):
            sender.encode(torch.ones(2, 8), bad)
    with pytest.raises(ValueError, match="out must be contiguous: it has strides"):
        receiver.decode(wire, torch.ones(8, 2).mT)
    assert sender.history() == receiver.history() == before
    turned = data("random", 16).view(8, 2).mT  # what is sent need not be contiguous
    wire_of_turned = torch.zeros_like(wire)
    sender.encode(turned, wire_of_turned)
    ends("int4", (2, 8))[0].encode(turned.contiguous(), wire)
    assert wire_of_turned.equal(wire)


@pytest.mark.parametrize("text", ["int4", "int4+delta", "int4+reuse", "int4+lep"])
def test_a_message_that_changed_on_the_way_is_refused_and_may_come_again(text: str) -> None:
    pair, told = ends(text, (2, 70)), next(steps(1, (2, 70), torch.float32))
    play(pair, told)
    sender, receiver = pair
    for end in pair:
        end.begin(told.samples, False)
    wire = torch.zeros(sender.nbytes(), dtype=torch.uint8)
    sender.encode(told.tensors[0], wire)
    before = receiver.history(), receiver.checksum()
    out = torch.full((2, 70), 7.0)
    for place, name in ((3, "crc32"), (-16, "wire version"), (-12, "scheme"), (-8, "number")):
        bad = wire.clone()
        bad[place] ^= 1
        with pytest.raises(RuntimeError, match=f"message 3 of blocks.3: its .*{name}"):
            receiver.decode(bad, out)
    assert out.eq(7).all()
    assert (receiver.history(), receiver.checksum()) == before
    receiver.decode(wire, out)
    assert agree(pair)
    with pytest.raises(RuntimeError, match="its message number is 0x3, expected 0x4"):
        receiver.decode(wire, out)  # once


def test_messages_of_another_tensor_or_scheme_are_refused() -> None:
    scheme = Scheme.parse("int4")
    sender = Boundary("a", scheme, (2, 8), torch.float32)
    wire = torch.zeros(sender.nbytes(), dtype=torch.uint8)
    sender.encode(torch.ones(2, 8), wire)
    for other in (
        Boundary("b", scheme, (2, 8), torch.float32),
        Boundary("a", Scheme.parse("int4+lep"), (2, 8), torch.float32),
    ):
        with pytest.raises(RuntimeError, match="its scheme digest is"):
            other.decode(wire, torch.ones(2, 8))


def test_samples_and_messages_round_apart() -> None:
    x = data("random", 70).view(1, 70).expand(2, 70).contiguous()
    for text in ("int2:round=stochastic+delta", "int2:round=stochastic"):
        pair = ends(text, (2, 70))
        play(pair, Told([[1, 2]], True, [torch.zeros_like(x)]))
        out = play(pair, Told([[1, 2]], False, [x]))[0]
        assert not same(out[0], out[1])
    assert not same(play(pair, Told([], False, [x]))[0], out)


def test_threads_may_work_on_different_boundaries() -> None:
    texts = ["int4+delta", "int2:round=stochastic+delta:store=disk", "int4+reuse", "sign+lep"]

    def run(text: str) -> list[int]:
        pair = ends(text, (4, 70))
        for told in steps(20, (4, 70), torch.float32):
            play(pair, told)
        return [value for end in pair for value in (end.history(), end.checksum())]

    alone = [run(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, texts)) == alone
