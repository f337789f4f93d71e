"""What the operators refuse and what they do to their arguments: the same in kernels and fakes; memory, versions, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from tfb_ext import ops

OPS: Any = torch.ops.tfb_ext
LAYER = 7


def draws(device: torch.device) -> dict[str, Tensor]:
    samples = torch.tensor([3, 1], dtype=torch.int32, device=device)
    return {
        "sigma": torch.tensor([0.5, 1.0], device=device),
        "samples": samples,
        "seed": torch.tensor([9], device=device),
    }


def calls(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Any]]:
    """A right call of every operator: two samples of three rows, n = 16, m = 8, r = 4."""
    device = torch.device(device)
    generator = torch.Generator().manual_seed(1)

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    means, bases = [make(4, 16), make(2, 16)], [make(8, 4), make(5, 2)]
    return {
        "noise": {"r": 3, "n": 5, "seed": 1, "layer": LAYER, "sample": 2, "device": device},
        "shrink_group": {"x": make(6, 16), "means": means, **draws(device), "layers": [1, 2], "mode": "token"},
        "attend_": {
            "out": make(2, 3, 4, 8), "query": make(2, 4, 3, 8), "key": make(2, 2, 5, 8), "value": make(2, 2, 5, 8),
            "mask": make(2, 1, 6, 5), "scale": 0.5,
        },
        "expand_": {"y": make(6, 8), "z": make(6, 4), "basis": bases[0], "scaling": 0.5},
        "expand": {"z": make(6, 4), "basis": bases[0], "scaling": 0.5, "bias": make(8)},
        "update_group": {
            "x": make(6, 16), "means": means, "bases": bases, "biases": [make(8), make(5)], "scalings": [1.0, 2.0],
            **draws(device), "layers": [1, 2], "mode": "flipout", "weights": [make(8, 16), make(5, 16)],
        },
    }  # fmt: skip


def slots(arguments: dict[str, Any]) -> list[tuple[str, int | None]]:
    """Where the tensors are: the argument's name and, in lists, the place."""
    out: list[tuple[str, int | None]] = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            out.append((name, None))
        elif isinstance(value, list) and isinstance(value[0], Tensor):
            out += [(name, k) for k in range(len(value))]
    return out


def replaced(
    arguments: dict[str, Any], slot: tuple[str, int | None], change: Callable[[Tensor], Any]
) -> dict[str, Any]:
    name, place = slot
    if place is None:
        return {**arguments, name: change(arguments[name])}
    return {**arguments, name: [change(t) if k == place else t for k, t in enumerate(arguments[name])]}


def outcome(name: str, arguments: dict[str, Any]) -> Any:
    """The error's kind and text, or the shapes and types of what came back."""
    try:
        found = getattr(OPS, name)(**arguments)
    except (ValueError, TypeError) as error:
        return type(error), str(error)
    return tree_map_only(Tensor, lambda t: (t.shape, t.dtype, t.stride()), found)


ALL_SLOTS = [(name, slot) for name, arguments in calls().items() for slot in slots(arguments)]
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "int": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "row more": lambda t: torch.cat([t, t[:1]]),
    "no rows": lambda t: t[:0],
    "column less": lambda t: t[..., :-1],
    "no columns": lambda t: t[..., :0],
    "a dimension more": lambda t: t[None],
    "a dimension less": lambda t: t[0],
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "wide rows": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "turned": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "rows as one": lambda t: t[:1].expand_as(t),
    "contiguous": lambda t: t,
}
SCALARS: list[tuple[str, str, Any]] = [
    *(("noise", "layer", value) for value in (-1, 2**32, 0)),
    *((name, "layers", value) for name in ("shrink_group", "update_group") for value in ([1], [1, -1], [0, 2**32 - 1])),
    *((name, "mode", "rows") for name in ("shrink_group", "update_group")),
    *(("noise", key, value) for key in ("r", "n", "sample") for value in (-1, 0, 2**35)),
    ("update_group", "scalings", [1.0]),
    *((name, "lead", value) for name in ("shrink_group", "update_group") for value in (-1, 0, 1, 2**32)),
    *((name, "each", value) for name in ("shrink_group", "update_group") for value in (-1, 1, 2, 3, 2**62)),
]  # fmt: skip


def assert_fakes_agree(name: str, arguments: dict[str, Any]) -> None:
    told = outcome(name, arguments)
    meta = tree_map_only(Tensor, lambda t: t.to("meta") if t.is_contiguous() else meta_like(t), arguments)
    if name == "noise":
        meta["device"] = torch.device("meta")
    assert outcome(name, meta) == told
    with FakeTensorMode() as mode:
        assert outcome(name, tree_map_only(Tensor, mode.from_tensor, arguments)) == told


def meta_like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ALL_SLOTS), st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=2), st.data())
def test_fakes_refuse_what_kernels_refuse(target: tuple[str, Any], changes: list[str], data: st.DataObject) -> None:
    """One or two tensors of a call changed at random: kernel, meta and fake tensors answer alike, word for word."""
    name, slot = target
    arguments = calls()[name]
    for change in changes:
        try:
            arguments = replaced(arguments, slot, CHANGES[change])
        except (IndexError, RuntimeError):  # there is nothing to cut
            assume(False)
        slot = data.draw(st.sampled_from(slots(arguments)))
    assert_fakes_agree(name, arguments)


@pytest.mark.parametrize(("name", "key", "value"), SCALARS)
def test_fakes_refuse_numbers_and_words_that_kernels_refuse(name: str, key: str, value: Any) -> None:
    if (key, value) in (("n", 2**35), ("r", 2**35)):
        with pytest.raises(ValueError, match=rf"noise: {key} is 34359738368, expected 1 to"):
            OPS.noise(**{**calls()[name], key: value})
    assert_fakes_agree(name, {**calls()[name], key: value})


@pytest.mark.parametrize(("name", "slot"), ALL_SLOTS)
@pytest.mark.parametrize("lone", [True, False], ids=["one on meta", "one on the device"])
def test_mixed_devices(device: torch.device, name: str, slot: tuple[str, Any], lone: bool) -> None:
    """A meta tensor among real ones, or a real one among meta tensors, is refused by name; nothing uninitialised returns."""
    first, second = (device, "meta") if lone else ("meta", device)
    other = dict(zip(slots(calls()[name]), slots(calls()[name]), strict=True))[slot]
    stranger = calls(second)[name][other[0]]
    stranger = stranger if other[1] is None else stranger[other[1]]
    with pytest.raises(ValueError, match=rf"{name}: .* is on .*, but .* is on .*; put both on one device"):
        getattr(OPS, name)(**replaced(calls(first)[name], slot, lambda _: stranger))


@pytest.mark.parametrize("name", ["expand_", "expand", "shrink_group", "update_group"])
def test_other_layouts(name: str) -> None:
    """Sparse, quantised and nested tensors are no operands of these operators, whichever argument they are."""
    kinds: list[Callable[[Tensor], Any]] = [
        lambda t: t.to_sparse(),
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8) if t.is_floating_point() else t.to_sparse(),
        lambda t: torch.nested.nested_tensor([t, t]),
    ]
    for slot in slots(calls()[name]):
        for kind in kinds:
            with pytest.raises((NotImplementedError, TypeError, ValueError), match=f"{name}"):
                getattr(OPS, name)(**replaced(calls()[name], slot, kind))


def test_seed_is_an_integer() -> None:
    for value in (1.0, "1", None):
        with pytest.raises(TypeError, match="noise: seed is .*, expected an integer from 0 to"):
            ops.noise(2, 3, value, 1, 1)  # type: ignore[arg-type]


# memory


def places(size: tuple[int, int], stride: tuple[int, int], offset: int) -> set[int]:
    return {offset + i * stride[0] + j * stride[1] for i in range(size[0]) for j in range(size[1])}


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(0, 5), m=st.integers(0, 6), r=st.integers(1, 4), pitch=st.integers(0, 14), start=st.integers(0, 80),
    z_pitch=st.integers(0, 14), z_start=st.integers(0, 80), basis=st.booleans(),
)  # fmt: skip
@example(rows=5, m=6, r=2, pitch=9, start=0, z_pitch=9, z_start=6, basis=False)  # columns of one buffer, apart
@example(rows=5, m=6, r=2, pitch=9, start=0, z_pitch=9, z_start=5, basis=False)
@example(rows=1, m=6, r=2, pitch=0, start=0, z_pitch=0, z_start=5, basis=False)
def test_expand_reads_no_memory_that_it_writes(
    rows: int, m: int, r: int, pitch: int, start: int, z_pitch: int, z_start: int, basis: bool
) -> None:
    """y beside or over z (or the basis) in one buffer: refused where they share an element, else right; so do the fakes."""
    buffer = torch.randn(200, generator=torch.Generator().manual_seed(rows + m))
    z, other = torch.randn(rows, r), torch.randn(m, r)
    shape, stride = ((m, r), (r, 1)) if basis else ((rows, r), (z_pitch, 1))
    y_places = places((rows, m), (pitch, 1), start)
    inside = len(y_places) < rows * m
    shared = y_places & places(shape, stride, z_start)

    def call(store: Tensor, z: Tensor, other: Tensor) -> Tensor:
        y, read = store.as_strided((rows, m), (pitch, 1), start), store.as_strided(shape, stride, z_start)
        OPS.expand_(y, *((z, read) if basis else (read, other)), 0.5)
        return y

    meta = [t.to("meta") for t in (buffer, z, other)]
    if inside or shared:
        for arguments in ((buffer, z, other), meta):
            before = arguments[0].clone()
            with pytest.raises(
                ValueError, match="rows overlap" if inside else "expand_: .* got memory that is y's too"
            ):
                call(*arguments)
            assert arguments[0].is_meta or torch.equal(arguments[0], before)
        return
    y, read = buffer.as_strided((rows, m), (pitch, 1), start), buffer.as_strided(shape, stride, z_start)
    wanted = y + 0.5 * (z if basis else read) @ (read if basis else other).T
    assert torch.allclose(call(buffer, z, other), wanted, atol=1e-5)
    call(*meta)


def test_memory_shared_by_two_storages() -> None:
    """Storages that differ can hold the same memory, as two views of one NumPy array do."""
    array = torch.ones(8, 8).numpy()
    y, z = torch.from_numpy(array), torch.from_numpy(array)
    with pytest.raises(ValueError, match=r"expand_: z got memory that is y's too.*Fix: pass z.clone\(\)"):
        ops.expand_(y, z, torch.ones(8, 8), 1.0)


def test_negative_views() -> None:
    """Views with torch's lazy sign are read and written with their sign."""
    base = torch.randn(6, 8, 2, generator=torch.Generator().manual_seed(1))
    y = torch.view_as_complex(base.clone()).conj().imag
    assert y.is_neg()
    z, basis = torch.randn(6, 4), torch.randn(8, 4)
    wanted = -base[..., 1] + z @ basis.T
    assert torch.allclose(ops.expand_(y, z, basis, 1.0), wanted, atol=1e-5)


# versions and gradients


def test_expand_counts_its_change(device: torch.device) -> None:
    z, basis = torch.ones(6, 4, device=device), torch.ones(8, 4, device=device)
    for wide in (torch.zeros(6, 8, device=device), torch.zeros(6, 20, device=device)):
        y = wide[:, :8]
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            before = wide._version
            with context():
                ops.expand_(y, z, basis, 1.0)
            assert wide._version == y._version == before + 1
    before = z._version, basis._version
    ops.expand(z, basis, 1.0)
    assert (z._version, basis._version) == before


def test_a_refused_call_changes_nothing() -> None:
    y = torch.zeros(6, 8)
    with pytest.raises(ValueError, match="expand_: z has 5 rows"):
        ops.expand_(y, torch.ones(5, 4), torch.ones(8, 4), 1.0)
    assert y._version == 0 and not y.any()


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_a_change_of_what_autograd_saved_is_noticed(device: torch.device, context: Any) -> None:
    leaf = torch.randn(6, 8, device=device, requires_grad=True)
    y = leaf.exp()  # whose derivative is its value
    with context():
        ops.expand_(y.detach(), torch.ones(6, 4, device=device), torch.ones(8, 4, device=device), 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("name", "slot"),
    [
        (n, s)
        for n, s in ALL_SLOTS
        if n != "attend_" and s[0] not in ("samples", "seed") and (n, s[0]) != ("expand_", "y")
    ],
)
def test_a_backward_pass_raises(device: torch.device, name: str, slot: tuple[str, Any]) -> None:
    """No derivative is not a derivative of zero, whichever argument asks for it; without grad mode nothing is recorded."""
    arguments = replaced(calls(device)[name], slot, lambda t: t.clone().requires_grad_())
    plain = getattr(OPS, name)(**calls(device)[name])
    found = getattr(OPS, name)(**arguments)
    out = arguments["y"] if name == "expand_" else found[0] if isinstance(found, list) else found
    assert out.requires_grad
    with pytest.raises(RuntimeError, match=f"derivative for tfb_ext::{name} is not implemented"):
        out.sum().backward()
    with torch.no_grad():
        again = getattr(OPS, name)(**replaced(calls(device)[name], slot, lambda t: t.clone().requires_grad_()))
    for a, b in zip(*([made] if isinstance(made, Tensor) else made or [] for made in (again, plain)), strict=True):
        assert not a.requires_grad and torch.equal(a, b)


@pytest.mark.parametrize("name", ["out", "query", "key", "value", "mask"])
def test_attention_refuses_gradients(device: torch.device, name: str) -> None:
    """Before it writes: what is written into a part of a tensor could not be told to it."""
    arguments = calls(device)["attend_"]
    arguments[name] = arguments[name].clone().requires_grad_()
    before = arguments["out"].clone()
    with pytest.raises(RuntimeError, match="derivative for tfb_ext::attend_ is not implemented"):
        OPS.attend_(**arguments)
    assert torch.equal(arguments["out"], before)
    with torch.no_grad():
        OPS.attend_(**arguments)
    assert not torch.equal(arguments["out"], before)


def test_adding_to_what_requires_grad(device: torch.device) -> None:
    leaf = torch.zeros(6, 8, device=device, requires_grad=True)
    z, basis = torch.ones(6, 4, device=device), torch.ones(8, 4, device=device)
    for y in (leaf, leaf[:, :8]):
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            ops.expand_(y, z, basis, 1.0)
        assert not leaf.any()
    y = leaf * 1
    ops.expand_(y[:3], z[:3], basis, 1.0)
    with pytest.raises(RuntimeError, match="derivative for tfb_ext::expand_ is not implemented"):
        y.sum().backward()
    with torch.no_grad():
        ops.expand_(leaf, z, basis, 1.0)
    assert (leaf == 4).all()


def test_inference_tensors(device: torch.device) -> None:
    z, basis = torch.ones(6, 4, device=device), torch.ones(8, 4, device=device)
    with torch.inference_mode():
        y = torch.zeros(6, 8, device=device)
        ops.expand_(y, z, basis, 1.0)
    assert (y == 4).all()
    with pytest.raises(ValueError, match=r"expand_: y got an inference tensor.*Fix: pass y.clone\(\)"):
        ops.expand_(y, z, basis, 1.0)
    assert (y == 4).all()
    assert torch.equal(ops.expand(z, basis, 1.0), y), "reading one is allowed"


def test_forward_derivatives_raise() -> None:
    given = {**calls()["shrink_group"]}
    x = given.pop("x")
    with pytest.raises(NotImplementedError, match="tfb_ext::shrink_group"):
        torch.func.jvp(lambda x: ops.shrink_group(x, **given)[0], (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        z = torch.autograd.forward_ad.make_dual(torch.ones(6, 4), torch.ones(6, 4))
        with pytest.raises(NotImplementedError, match="tfb_ext::expand_"):
            ops.expand_(torch.zeros(6, 8), z, torch.ones(8, 4), 1.0)


# tracing


@pytest.mark.parametrize("name", zoo.slow_but(calls(), "shrink"))
def test_opcheck_with_gradients(device: torch.device, name: str) -> None:
    arguments = calls(device)[name]
    if name not in ("noise", "attend_"):  # which has no gradients to ask for, and which refuses to be asked
        arguments = replaced(
            arguments, slots(arguments)[-1 if name.startswith("expand") else 0], lambda t: t.requires_grad_()
        )
    # The backward pass of the test for AOT dispatch would have to raise.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(OPS, name).default, (), arguments, test_utils=tests)


def block(x: Tensor, mean: Tensor, basis: Tensor, sigma: Tensor, samples: Tensor, seed: Tensor) -> Tensor:
    z = ops.shrink(x, mean, sigma, samples, seed, LAYER)
    y = ops.expand_(x @ mean.T @ basis.T, z, basis, 2.5)
    (update,) = ops.update_group(x, [mean], [basis], [None], [1.0], sigma, samples, seed, [LAYER])
    return y + update + ops.expand(z, basis, 1.0)


@pytest.mark.slow
def test_one_program_serves_every_number_of_rows() -> None:
    """Checks of symbolic sizes are guards: rows and features may vary without another compilation, wrong sizes are refused."""
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    generator = torch.Generator().manual_seed(2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, n, m, r in ((6, 16, 8, 4), (10, 24, 9, 3), (64, 17, 30, 5)):
            x, mean, basis = (torch.randn(*s, generator=generator) for s in ((rows, n), (r, n), (m, r)))
            given = x, mean, basis, *draws(torch.device("cpu")).values()
            assert torch.allclose(compiled(*given), block(*given), atol=1e-4)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="shrink_group: x has .* rows, expected a multiple of the"):
        torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")(torch.ones(7, n), *given[1:])


@pytest.mark.slow
def test_sizes_that_depend_on_data() -> None:
    torch._dynamo.reset()

    def chosen(x: Tensor, keep: Tensor, z: Tensor, basis: Tensor) -> Tensor:
        y = x[keep]
        return ops.expand_(y + 1, z[keep], basis, 0.5)

    compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager")
    z, basis = torch.randn(6, 4), torch.randn(8, 4)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for kept in (3, 5):
            x, keep = torch.randn(6, 8), torch.arange(6) < kept
            assert torch.allclose(compiled(x, keep, z, basis), chosen(x, keep, z, basis), atol=1e-5)


@pytest.mark.slow
def test_compiled_additions_of_overlapping_memory() -> None:
    """Where torch.compile works on copies, the answer is that of the copies; where it refuses, it refuses in words."""
    torch._dynamo.reset()
    square = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    compiled = torch.compile(lambda y: ops.expand_(y, y, torch.eye(8), 1.0) * 1, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="expand_: z got memory that is y's too"):
        compiled(square.clone())
