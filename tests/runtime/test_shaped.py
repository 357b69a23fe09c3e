"""Shaped sketches at run time: modules against their dense weight, loading, saving, training."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import sketchconv
from sketchconv.formats import grids
from sketchconv.formats.reader import SktchModel
from sketchconv.formats.validate import validate
from sketchconv.kernels.decoder.session import Session
from sketchconv.kernels.ggml import packed
from sketchconv.pipeline import convert
from sketchconv.recipe import Override, Recipe, SketchSpec
from sketchconv.recovery.options import RecoveryError
from sketchconv.recovery.student import trainable_layers
from sketchconv.runtime import products
from sketchconv.runtime.shaped import ShapedLinear

FORMS = [(grid, bits) for grid, known in grids.GRIDS.items() for bits in known.bits]
every_form = pytest.mark.parametrize(("grid", "bits"), FORMS)
ROWS, COLUMNS, GROUPS = 70, 128, 2


def module(grid: str, bits: int, **settings) -> ShapedLinear:
    torch.manual_seed(bits)
    made = ShapedLinear(COLUMNS, ROWS, bits, grid, GROUPS, **settings)
    made.sketch_index.random_(0, 256)
    made.sketch_scale.data.normal_(0, 0.02)
    if made.bias is not None:
        made.bias.data.normal_()
    return made


@every_form
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_dense_weight(grid, bits, tokens, dtype, monkeypatch):
    monkeypatch.setattr(products, "SMALL_TILE", 1 << 11)  # several tiles
    made, x = module(grid, bits), torch.randn(2, tokens, COLUMNS).to(dtype)
    weight = made.dequantize()
    expected = x.float() @ weight.T + made.bias
    room = {torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(made(x).float(), expected, rtol=room, atol=room)
    assert made(x).dtype is dtype


@every_form
def test_the_plain_decoder_gives_the_same_bits(grid, bits):
    made = module(grid, bits)
    plain = products.dense_plain(made.sketch_index, made.sketch_scale, grid, bits, torch.float32)
    assert torch.equal(plain.detach().view(torch.int32), made.dequantize().view(torch.int32))


@every_form
@pytest.mark.parametrize("tokens", [3, 33])
def test_gradients_are_those_of_plain_torch(grid, bits, tokens, monkeypatch):
    monkeypatch.setattr(products, "SMALL_TILE", 1 << 11)
    made, x = module(grid, bits), torch.randn(tokens, COLUMNS, requires_grad=True)
    scale = made.sketch_scale.detach().float().requires_grad_()
    weight = products.dense_plain(made.sketch_index, scale, grid, bits, torch.float32)
    outer = torch.randn(tokens, ROWS)
    other = x.detach().clone().requires_grad_()
    ((other @ weight.T) * outer).sum().backward()
    (made(x) * outer).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)
    found = made.sketch_scale.grad.float()
    torch.testing.assert_close(found, scale.grad, rtol=2e-3, atol=2e-3 * float(scale.grad.std()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_few_tokens_have_the_results_that_they_have_alone(dtype, monkeypatch):
    monkeypatch.setattr(packed, "PARALLEL_WEIGHTS", 1)  # several threads
    made, x = module("affine", 5), torch.randn(8, COLUMNS).to(dtype)
    together = made(x)
    with torch.no_grad():
        assert torch.equal(made(x), together)
        assert torch.equal(made(x.view(4, 2, COLUMNS)).view(8, -1), together)
    for token in range(8):
        assert torch.equal(made(x[token]), together[token])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(made(x), together)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(products, "FUSED_TOKENS", 0)
    room = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(made(x), together, rtol=room, atol=room)


@torch.no_grad()
def test_the_checked_form_follows_the_tensors():
    made, other, x = module("affine", 5), module("affine", 5), torch.randn(3, COLUMNS)
    other.sketch_index.random_(0, 256)
    other.sketch_scale.normal_()
    known = made.shaped()
    assert known is not None
    assert made.shaped() is known
    first, second = made(x), other(x)
    copies = copy.deepcopy(made), pickle.loads(pickle.dumps(made))
    assert made(x[:0]).shape == (0, ROWS)
    made.sketch_scale.mul_(2)  # in place: the same address
    made.bias.mul_(2)
    torch.testing.assert_close(made(x), 2 * first)
    made.sketch_scale = torch.nn.Parameter(other.sketch_scale.clone())
    made.sketch_index.data = other.sketch_index.clone()
    made.bias.copy_(other.bias)
    assert torch.equal(made(x), second)
    made.load_state_dict(copies[0].state_dict(), assign=True)
    for again in (made, *copies):
        assert torch.equal(again(x), first)
    assert made.to("meta").shaped() is None


def test_few_tokens_have_gradients_where_they_are_asked_for():
    made, x = module("affine", 5), torch.randn(3, COLUMNS)
    assert made(x).requires_grad
    frozen = made.requires_grad_(False)
    assert not frozen(x).requires_grad
    x.requires_grad_()
    assert frozen(x).requires_grad


def test_casts_leave_scales_alone():
    made = module("affine", 4)
    before = made.sketch_scale.detach().clone()
    for cast in (made.bfloat16(), made.float(), made.half()):
        assert cast.dtype in (torch.bfloat16, torch.float32, torch.float16)
        assert torch.equal(made.sketch_scale, before)
    assert list(made.state_dict()) == ["sketch_scale", "bias", "sketch_index"]


def test_copies_and_transforms_work():
    made, x = module("iq4_nl", 4), torch.randn(3, COLUMNS)
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(again(x), made(x))
    torch.testing.assert_close(torch.func.vmap(made)(x), made(x), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype is torch.bfloat16


@every_form
def test_exported_programs_give_the_same(grid, bits):
    made, x = module(grid, bits).requires_grad_(False), torch.randn(3, COLUMNS)
    program = torch.export.export(made, (x,)).module()
    torch.testing.assert_close(program(x), made(x), rtol=1e-4, atol=1e-5)


def test_doubles_are_multiplied_as_doubles():
    made, x = module("affine", 5, bias=False), torch.randn(3, COLUMNS, dtype=torch.float64)
    expected = x @ made.dequantize(torch.float64).T
    torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)


def test_wrong_inputs_are_refused():
    made = module("iq4_nl", 4)
    with pytest.raises(ValueError, match="x must be float"):
        made(torch.randn(2, COLUMNS + 1))
    with pytest.raises(ValueError, match="x must be float"):
        made(torch.zeros(2, COLUMNS, dtype=torch.int64))
    with pytest.raises(ValueError, match="no grid 'iq4_nl' of 5 bits"):
        ShapedLinear(COLUMNS, ROWS, 5, "iq4_nl", GROUPS)
    with pytest.raises(ValueError, match="multiple of 32 columns, got 8 groups in 128 columns"):
        ShapedLinear(COLUMNS, ROWS, 4, "iq4_nl", 8)


@pytest.fixture(scope="module")
def sketch(tiny, tmp_path_factory):
    """A Llama with shaped weights of three kinds and a free one, as a bundle."""
    folder = tmp_path_factory.mktemp("shaped")
    tiny.build("LlamaForCausalLM").save_pretrained(folder / "dense")
    overrides = (
        Override("*.v_proj", grid="affine", bits=5),
        Override("*.o_proj", grid="free", bits=3),
        Override("*.up_proj", grid="symmetric", bits=8),
    )
    recipe = Recipe(SketchSpec(grid="iq4_nl"), weighting="equal", overrides=overrides)
    convert(folder / "dense", folder / "tiny.sktch", recipe)
    return folder / "tiny.sktch"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40).view(2, 20)).logits


def test_a_loaded_model_computes_with_the_stored_weights(sketch, tiny):
    model = sketchconv.load(sketch)
    kinds = {m.grid for m in model.modules() if isinstance(m, ShapedLinear)}
    assert kinds == {"iq4_nl", "affine", "symmetric"}
    dense = tiny.build("LlamaForCausalLM")
    with SktchModel.open(sketch) as stored, torch.no_grad():
        for name in stored.manifest.sketches:
            path = name.removesuffix(".weight")
            weight = torch.from_numpy(stored.decode(name))
            assert torch.equal(model.get_submodule(path).weight, weight)
            dense.get_submodule(path).weight.copy_(weight)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)


def test_save_pretrained_keeps_every_bit(sketch, tmp_path):
    model = sketchconv.load(sketch)
    model.save_pretrained(tmp_path / "saved")
    assert list(validate(tmp_path / "saved")) == []
    with SktchModel.open(sketch) as before, SktchModel.open(tmp_path / "saved") as after:
        assert after.manifest.version == "1.1"
        assert dict(after.manifest.sketches) == dict(before.manifest.sketches)
        assert dict(after.manifest.errors) == dict(before.manifest.errors)
        for record in before.manifest.sketches.values():
            for name in (record.index_name, record.lut_name):
                assert before.read(name) == after.read(name)
    assert torch.equal(logits(sketchconv.load(tmp_path / "saved")), logits(model))


def test_generation_and_dense_form(sketch, monkeypatch):
    model = sketchconv.load(sketch)
    ids = torch.arange(3, 9).view(1, -1)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    steps = []
    step = Session.step
    monkeypatch.setattr(Session, "step", lambda *args: steps.append(args[1:]) or step(*args))
    text = model.generate(ids, **options)
    assert text.shape == (1, 26)
    assert [place for _, place in steps] == list(range(6, 25))
    assert torch.equal(type(model).generate(model, ids, **options), text)  # by the modules
    before = logits(model)
    dense = model.dequantize()
    assert not any(isinstance(m, ShapedLinear) for m in dense.modules())
    torch.testing.assert_close(logits(dense), before, rtol=1e-4, atol=1e-5)


def test_recovery_says_that_it_trains_luts_alone(sketch):
    with pytest.raises(RecoveryError, match="has scales of a fixed grid; convert with --grid free"):
        trainable_layers(sketchconv.load(sketch))
