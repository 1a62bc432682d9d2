"""What compressors remember: bad blocks, held segments, idle blocks, regrouping, state."""

from __future__ import annotations

import io

import pytest
import torch

from commlib.codecs import codec
from commlib.feedback import Compressor, names_of, owner_key
from commlib_kernels import Layout
from commlib_kernels.layout import pieces
from tests.compressors import made, residual, send
from tests.contract import data, same


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("text", ["int4", "sign", "fp8"])
def test_t19_a_bad_block_keeps_its_residual_and_the_next_step_is_clean(
    text: str, kind: str
) -> None:
    c = made(text, f"ef:dtype={kind}")
    for step in range(3):
        send(c, "w", data("random", 512, step))
    before = c.state_dict()
    x = data("random", 512, 9).clone()
    x[200] = float("nan")
    out = send(c, "w", x)
    after = c.state_dict()
    assert out[128:256].isnan().all()
    assert out[:128].isfinite().all()
    for what in ("residuals", "scales"):
        for name, old in before[what].items():
            blocks = slice(128, 256) if what == "residuals" else slice(1, 2)
            assert same(after[what][name][blocks], old[blocks])
    assert not same(after["residuals"]["w"][:128], before["residuals"]["w"][:128])
    assert send(c, "w", data("random", 512, 10)).isfinite().all()


def test_t19_casts_keep_the_residual_of_a_bad_element_alone() -> None:
    c = made("fp16")
    x = data("random", 64)
    send(c, "w", x)
    before = residual(c, "w")
    bad = x.clone()
    bad[5], bad[6], bad[7] = float("inf"), 1e6, float("nan")
    assert not send(c, "w", bad)[5:8].isfinite().any()
    assert residual(c, "w")[5:8].equal(before[5:8])
    assert send(c, "w", x).isfinite().all()


def test_t7_held_segments_keep_their_residual() -> None:
    c, layout = made("int4"), Layout((300, 200))
    key = ("a", "b")
    send(c, key, data("random", 500), layout)
    before = c.state_dict()["residuals"]
    x = torch.cat([data("random", 300, 1), torch.zeros(200)])
    out = send(c, key, x, layout, hold=(1,))
    after = c.state_dict()["residuals"]
    assert out[300:].eq(0).all()
    assert after["b"].equal(before["b"])
    assert before["b"].ne(0).any()
    assert not after["a"].equal(before["a"])


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("text", ["int8", "int4", "sign", "bf16", "natural"])
def test_t19_an_idle_block_fades_to_zero(text: str, kind: str) -> None:
    """Zero gradients shrink an int8 residual 254x a step: unbounded, 1 / scale would overflow."""
    c = made(text, f"ef:dtype={kind}")
    x = data("random", 256).clone()
    send(c, "w", x)
    x[:128] = 0
    for _ in range(200):
        out = send(c, "w", x)
        assert out.isfinite().all()
        assert residual(c, "w").isfinite().all()
    if text in ("int8", "int4"):
        assert residual(c, "w")[:128].eq(0).all()
        assert out[:128].eq(0).all()


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_narrow_residuals_are_nearly_as_good(kind: str) -> None:
    """Error of the mean of 100 messages, against the same with an fp32 residual."""
    x = data("random", 1024)
    errors = {}
    for dtype in ("fp32", kind):
        c = made("int3", f"ef:dtype={dtype}")
        mean = sum(send(c, "w", x) for _ in range(100)) / 100
        errors[dtype] = float((mean - x).norm() / x.norm())
    assert errors[kind] < 2.5 * errors["fp32"] + 1e-3


def test_memory_is_reported() -> None:
    for kind, size in (("fp32", 4 * 1000), ("bf16", 2 * 1000), ("int8", 1000 + 2 * 8)):
        c = made("int4", f"ef:dtype={kind}")
        assert c.nbytes() == 0
        send(c, "w", data("random", 1000))
        assert c.nbytes() == size


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_t1_residuals_follow_their_names_into_other_messages(kind: str) -> None:
    """One bucket, then two in reverse order, as DDP rebuilds them: the same bytes as apart."""
    sizes = {"a": 300, "b": 65, "c": 500}
    together = made("int4:round=stochastic", f"ef:dtype={kind}", seed=3, rank=1)
    apart = made("int4:round=stochastic", f"ef:dtype={kind}", seed=3, rank=1)
    for step, buckets in enumerate([["abc"], ["abc"], ["cb", "a"], ["cb", "a"], ["abc"]]):
        for bucket in buckets:
            parts = [data("random", sizes[n], 10 * step + ord(n)) for n in bucket]
            layout = Layout(tuple(sizes[n] for n in bucket))
            out = send(together, tuple(bucket), torch.cat(parts), layout)
            want = torch.cat([send(apart, n, p) for n, p in zip(bucket, parts, strict=True)])
            assert out.equal(want)
    left, right = together.state_dict(), apart.state_dict()
    for what in ("residuals", "scales"):
        assert left[what].keys() == right[what].keys()
        assert all(same(left[what][n], right[what][n]) for n in left[what])
    assert left["steps"] == right["steps"] == dict.fromkeys("abc", 5)
    assert together.nbytes() == apart.nbytes()


@pytest.mark.parametrize("text", ["int4", "int8:round=stochastic", "sign"])
def test_slices_of_a_message_share_a_step_and_a_residual(text: str) -> None:
    whole, sliced = made(text, seed=1), made(text, seed=1)
    layout = Layout((3000, 50), ranks=2, align=128)
    for step in range(3):
        x = data("random", 3050, step)
        want, got = send(whole, ("a", "b"), x, layout), torch.zeros_like(x)
        sliced.advance(("a", "b"))
        for s in range(3):
            part = layout.slice(s, 3)
            wire = torch.zeros(sliced.codec.nbytes(part), dtype=torch.uint8)
            sliced.compress(("a", "b"), x, wire, part)
            sliced.decompress(("a", "b"), wire, got, part)
        assert got.equal(want)
    assert residual(sliced, "a").equal(residual(whole, "a"))


def test_owners_have_residuals_of_their_own() -> None:
    """The reducing side remembers what its second rounding loses, under another key."""
    c, layout = made("int4"), Layout((1000,), ranks=2, align=128)
    key = owner_key("w")
    assert key == ("w|reduced",)
    assert owner_key(None) is None
    assert names_of(None) == ()
    total = torch.zeros(layout.chunk_numel(1), dtype=torch.float64)
    came = torch.zeros_like(total)
    one, dense = layout.only(1), layout.only(1, dense=True)
    for step in range(5):
        wires = []
        for rank in range(2):
            x = data("random", 1000, 2 * step + rank)
            wires.append(torch.zeros(codec("int4").nbytes(layout), dtype=torch.uint8))
            made("int4", "").compress("w", x, wires[-1], layout)
        size = wires[0].numel() // 2
        received = torch.cat([w[size:] for w in wires])
        exact = torch.zeros(layout.chunk_numel(1))
        c.reduce(key, received, exact, one, factor=0.5)
        out = torch.zeros(size, dtype=torch.uint8)
        c.advance(key)
        c.reduce(key, received, out, one, factor=0.5)
        back = torch.zeros_like(exact)
        c.decompress(key, out, back, dense)
        total, came = total + exact, came + back
        held = residual(c, "w|reduced")
        torch.testing.assert_close(came + held, total, rtol=0, atol=1e-5)
    assert list(c.state_dict()["residuals"]) == ["w|reduced"]
    assert [p.numel for p in pieces(one, c.codec.format)] == [held.numel()]


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_t16_a_resumed_run_is_the_uninterrupted_one(kind: str) -> None:
    def run(c: Compressor, steps: range) -> list[torch.Tensor]:
        layout = Layout((500, 40))
        return [send(c, ("a", "b"), data("random", 540, s), layout) for s in steps]

    text, rule = "int3:round=stochastic", f"ef:omega=0.5:dtype={kind}"
    whole = made(text, rule, seed=5, rank=2)
    want = run(whole, range(8))
    first = made(text, rule, seed=5, rank=2)
    run(first, range(4))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = made(text, rule, seed=5, rank=2)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(first, range(4, 6))  # the saved state is a copy: going on does not change it
    got = run(second, range(4, 8))
    assert all(a.equal(b) for a, b in zip(got, want[4:], strict=True))
    assert second.nbytes() == whole.nbytes()


def test_state_of_another_kind_is_refused() -> None:
    c = made("int4")
    send(c, "w", data("random", 100))
    state = c.state_dict()
    for rule in ("", "ef:dtype=bf16"):
        with pytest.raises(ValueError, match=r"residual of 'w' is torch\.float32, but int4"):
            made("int4", rule).load_state_dict(state)
    other = made("int4")
    other.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"'w' has 100 elements, the tensor now needs 64"):
        send(other, "w", data("random", 64))
    narrow = made("int4:block=32", "ef:dtype=int8")
    send(narrow, "w", data("random", 100))
    wide = made("int4", "ef:dtype=int8")
    wide.load_state_dict(narrow.state_dict())
    with pytest.raises(RuntimeError, match="'w' has 4 scales, blocks of 128 elements need 1"):
        send(wide, "w", data("random", 100))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_t17_rescale_and_reset(kind: str) -> None:
    c = made("int4", f"ef:dtype={kind}")
    send(c, "w", data("random", 500))
    before = residual(c, "w")
    c.memory("w", "q", torch.ones(3)).fill_(2)
    c.rescale(0.25)
    assert residual(c, "w").equal(before / 4)
    assert c.nbytes() > 12
    c.reset()
    assert c.nbytes() == 0
    assert c.memory("w", "q", torch.ones(3)).eq(0).all()
    x = data("random", 500, 1)
    assert send(c, "w", x).equal(send(made("int4", ""), "w", x))


def test_named_state_is_saved() -> None:
    c = made("int4", "")
    c.memory("layer.w", "q", torch.ones(3)).fill_(2)
    other = made("int4", "")
    other.load_state_dict(c.state_dict())
    assert other.memory("layer.w", "q", torch.ones(3)).tolist() == [2, 2, 2]
