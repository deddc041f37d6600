"""Linears in 8 bits: how far off, how large, and that the decoder's own stay as they are."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense_core.compressor.condenser import Condenser
from condense_core.compressor.quantized import WEIGHT_FORMATS, QuantizedLinear, quantize_linears
from condense_core.tasks.sources import ProseWriter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = 1 + 1e-4  # fp32 places a weight among the steps to 127 * 2^-24 of one, twice
TEXT = ProseWriter().document(3, 8)


def linear(rows: int, columns: int, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Rows of very different size, the last of which is zero where there are several."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    made = nn.Linear(columns, rows, bias=bias).requires_grad_(False)
    made.weight.copy_(torch.randn(rows, columns, generator=generator) * torch.logspace(-6, 3, rows)[:, None])
    if rows > 1:
        made.weight[-1] = 0
    if bias:
        made.bias.copy_(torch.randn(rows, generator=generator))
    return made.to(dtype)


def steps(weight: Tensor, largest: float) -> Tensor:
    """The most that a scale can be, which is raised by a 256th and then rounded to bfloat16, by a 256th at most."""
    return weight.abs().amax(1, keepdim=True) / largest * (1 + 2**-8 + 2**-14) * (1 + 2**-8)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 64), (129, 33)], ids=str)
def test_int8_is_within_half_a_step(shape: tuple[int, int]) -> None:
    exact = linear(*shape)
    made = QuantizedLinear(exact, "int8")
    error = (made.weight - exact.weight).abs()
    assert (error <= 0.5 * steps(exact.weight, 127) * ROUNDING).all()
    assert made.values.abs().max() <= 127


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 64), (129, 33)], ids=str)
def test_fp8_is_within_a_16th_of_each_weight(shape: tuple[int, int]) -> None:
    exact = linear(*shape)
    error = (QuantizedLinear(exact, "fp8").weight - exact.weight).abs()
    bound = torch.maximum(exact.weight.abs() * 2**-4, steps(exact.weight, 448) * 2**-10)
    assert (error <= bound * ROUNDING).all()


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_zero_and_vanishing_rows_stay_zero(weight_format: str) -> None:
    exact = nn.Linear(9, 3, bias=False).requires_grad_(False)
    exact.weight[0], exact.weight[1] = 0, 1e-42
    made = QuantizedLinear(exact, weight_format)
    assert torch.equal(made(torch.randn(4, 9))[:, :2], torch.zeros(4, 2))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    exact = linear(3, 5)
    exact.weight[1, 2] = value
    with pytest.raises(ValueError, match=r"^encoder_weights: a weight is not finite"):
        QuantizedLinear(exact, "int8")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_those_with_the_weight(dtype: torch.dtype, weight_format: str, bias: bool) -> None:
    """Within roundings of the dtype: of the product, of scaling it, of the bias, and in fp16 of the weight."""
    torch.manual_seed(0)
    exact = nn.Linear(300, 17, bias=bias).requires_grad_(False).to(dtype)
    made = QuantizedLinear(exact, weight_format)
    x = torch.randn(2, 11, 300).to(dtype)
    weight = made.weight.double() if dtype == torch.float16 else QuantizedLinear(exact.float(), weight_format).weight
    expected = F.linear(x.double(), weight.double(), exact.bias.double() if bias else None)
    found = made(x)
    assert found.dtype == dtype
    size = F.linear(x.double().abs(), weight.double().abs()).amax()
    assert (found.double() - expected).abs().max() <= 3 * torch.finfo(dtype).eps * size


def test_products_of_float16_stay_in_its_range() -> None:
    exact = nn.Linear(4096, 2, bias=False).requires_grad_(False).half()
    exact.weight.fill_(0.01)
    for weight_format in WEIGHT_FORMATS:  # 4096 * 10 * 127 would be far beyond
        found = QuantizedLinear(exact, weight_format)(torch.full((1, 4096), 10.0).half())
        assert torch.allclose(found.float(), torch.full((1, 2), 409.6), rtol=0.02)


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.25), (torch.bfloat16, 0.5)], ids=["fp32", "bf16"])
def test_bytes(weight_format: str, dtype: torch.dtype, share: float) -> None:
    layers = nn.ModuleList([nn.Sequential(linear(256, 384, dtype=dtype), nn.Sequential(linear(384, 256, dtype=dtype)))])
    before = sum(p.nbytes for p in layers.parameters())
    quantize_linears(layers, weight_format)
    assert not list(layers.parameters())
    after = sum(b.nbytes for b in layers.buffers())
    assert after == share * before + 4 * (256 + 384)
    assert after < 1.02 * share * before


# -- in a condenser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> Condenser:
    """The embedded model, whose compressor has an adapter on every linear."""
    return Condenser.from_pretrained("condense-tiny", device="cpu")


@pytest.mark.parametrize(("weight_format", "similar"), [("int8", 0.998), ("fp8", 0.99)])
def test_soft_tokens_are_close_and_the_decoder_is_untouched(
    plain: Condenser, weight_format: str, similar: float
) -> None:
    before = copy.deepcopy(plain.model.state_dict())
    made = Condenser(plain.model, plain.tokenizer, encoder_weights=weight_format)
    assert made.encoder_weights == weight_format
    assert not any(isinstance(module, QuantizedLinear) for module in plain.model.modules())
    assert not any(isinstance(module, nn.Linear) for module in made.compressor.encoder.layers.modules())
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    own, exact = made.compress(TEXT, 8), plain.compress(TEXT, 8)
    assert not torch.equal(own.embeds, exact.embeds)
    assert F.cosine_similarity(own.embeds, exact.embeds).min() > similar
    plain.generate(own, "Who?", max_new_tokens=2)


def test_an_adapter_is_merged_before(plain: Condenser) -> None:
    made = Condenser(plain.model, plain.tokenizer, encoder_weights="int8")
    merged = dict(plain.compressor.encoder.layers.named_modules())
    compared = 0
    for name, module in made.compressor.encoder.layers.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = merged[name].weight
            assert ((module.weight - weight).abs() <= 0.5 * steps(weight, 127) * ROUNDING).all()
            compared += 1
    assert compared == 2 * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_encoder_alone_holds_8_bits_and_gives_the_same_bits(dtype: torch.dtype) -> None:
    whole = Condenser.from_pretrained("condense-tiny", device="cpu", dtype=dtype, encoder_weights="int8")
    part = Condenser.from_pretrained(
        "condense-tiny", device="cpu", dtype=dtype, encoder_weights="int8", encoder_only=True
    )
    assert torch.equal(part.compress(TEXT, 8).embeds, whole.compress(TEXT, 8).embeds)
    linears = [m for m in part.compressor.encoder.layers.modules() if isinstance(m, QuantizedLinear)]
    eighth = sum(m.in_features * m.out_features + 4 * m.out_features for m in linears)
    assert sum(b.nbytes for m in linears for b in m.buffers()) == eighth
    matrices = [p for p in part.model.parameters() if p.dim() > 1]
    assert [p.shape[0] for p in matrices] == [4096]  # embeddings: no layer is held beside the encoder's


def test_select_with_a_question_reads_with_8_bits(lively_path: Path) -> None:
    part = Condenser.from_pretrained(
        lively_path, method="select", device="cpu", encoder_weights="fp8", encoder_only=True
    )
    assert len(part.compress(TEXT[:300], 4, question="Who?")) > 0


@pytest.mark.parametrize("encoder_only", [True, False])
def test_other_formats_are_refused_before_anything_is_loaded(encoder_only: bool) -> None:
    with pytest.raises(ValueError, match=r"^encoder_weights: got 'int4', expected one of int8, fp8$"):
        Condenser.from_pretrained("nowhere", encoder_weights="int4", encoder_only=encoder_only)


def test_a_live_compressor_stays_as_it_is(plain: Condenser) -> None:
    with pytest.raises(ValueError, match=r"^encoder_weights: got 'int8' for a live compressor, which stays as it is"):
        Condenser(plain.model, plain.tokenizer, compressor=plain.compressor, encoder_weights="int8")
