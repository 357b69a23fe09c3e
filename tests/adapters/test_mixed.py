"""Batches of several adapters: each sample as it is alone, in every kind of module and model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sketchconv
from sketchconv.adapters import batch
from sketchconv.adapters.batch import BASE
from sketchconv.errors import AdapterError
from sketchconv.formats.grids import GRIDS
from sketchconv.kernels import plain
from sketchconv.runtime import mixed
from sketchconv.runtime.experts import Experts
from sketchconv.runtime.modules import SketchEmbedding, SketchLinear
from sketchconv.runtime.shaped import ShapedLinear

NAMES = ["one", BASE, "two", "one"]


def alone(model, name, run):
    """What one adapter gives on its own."""
    if name == BASE:
        model.disable_adapters()
    else:
        model.set_adapter(name)
    result = run()
    model.enable_adapters()
    return result


def with_two(model, luts, part=1):
    model.load_adapter(luts(model, 1, part), "one")
    model.load_adapter(luts(model, 2, part), "two")
    return model


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("part", [1, 2])
def test_each_sample_has_what_it_has_alone(model, luts, ids, part, count):
    with_two(model, luts, part)
    ids = ids[:, :count]
    # Float32 sums in another order: width * 2**-24 of their size (Higham 2002, section 3.1) in each
    # of the products that follow one another, four in a layer and the head's.
    width = max(model.config.hidden_size, model.config.intermediate_size)
    error = (4 * model.config.num_hidden_layers + 1) * width * 2.0**-24
    with torch.no_grad():
        mixed = model(ids, adapter_names=NAMES).logits
        assert model.active_adapters() == ["two"]
        for number, name in enumerate(NAMES):
            row = ids[number : number + 1]
            single = alone(model, name, lambda row=row: model(row).logits)
            assert (mixed[number] - single[0]).abs().max() <= error * single.abs().max()


@pytest.mark.parametrize("bits", range(1, 9))
def test_modules_of_all_bits_with_and_without_gradient(bits):
    torch.manual_seed(bits)
    module = SketchLinear(51, 20, bits, 3, lut_dtype=torch.float32)
    module.sketch_index.random_(0, 256)
    tables = {BASE: module.sketch_lut, "a": None, "b": None}
    module.sketch_lut.data.normal_()
    for name in ("a", "b"):
        module.add_table(name, torch.randn_like(module.sketch_lut), trainable=True)
        tables[name] = module.lut_of(name)
    names = ("b", "a", BASE, "b")
    for shape in ((4, 51), (4, 2, 51), (4, 12, 51)):
        x = torch.randn(shape, requires_grad=True)
        target = torch.randn(*shape[:-1], 20)
        expected, grads = [], []
        for number, name in enumerate(names):
            module.switch(name)
            part = module(x[number])
            expected.append(part)
            grads.append(torch.autograd.grad((part * target[number]).sum(), x)[0][number])
        module.switch(BASE)
        with batch.use(names):
            y = module(x)
            with torch.no_grad():
                assert torch.allclose(module(x), y, atol=1e-4)
        assert torch.allclose(y, torch.stack(expected), atol=1e-4)
        slopes = torch.autograd.grad((y * target).sum(), [x, *tables.values()])
        assert torch.allclose(slopes[0], torch.stack(grads), atol=1e-4)
        for name, slope in zip(tables, slopes[1:], strict=True):
            own = [n for n, mine in enumerate(names) if mine == name]
            module.switch(name)
            part = (module(x[own]) * target[own]).sum()
            assert torch.allclose(slope, torch.autograd.grad(part, tables[name])[0], atol=1e-4)
        module.switch(BASE)


def test_embeddings_look_up_in_each_samples_table():
    torch.manual_seed(0)
    module = SketchEmbedding(30, 24, 4, 2, padding_idx=3, lut_dtype=torch.float32)
    module.sketch_index.random_(0, 256)
    module.sketch_lut.data.normal_()
    module.add_table("a", torch.randn_like(module.sketch_lut), trainable=True)
    ids = torch.randint(0, 30, (3, 7))
    base = module(ids)
    module.switch("a")
    other = module(ids)
    with batch.use(("a", BASE, "a")):
        rows = module(ids)
        positions = module(ids[:1])  # one row for all samples
    assert torch.equal(rows, torch.stack([other[0], base[1], other[2]]))
    assert torch.equal(positions, torch.stack([other[0], base[0], other[0]]))
    rows.sum().backward()
    assert module.lut_of("a").grad.abs().sum() > 0


def test_generate_repeats_the_names_for_beams_and_sequences(model, luts, ids):
    with_two(model, luts)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 6, "do_sample": False}
    beams = {"num_beams": 3, "num_return_sequences": 2}
    for more in ({}, beams):
        mixed = model.generate(ids, adapter_names=NAMES, **options, **more)
        each = mixed.shape[0] // 4
        for number, name in enumerate(NAMES):
            row = ids[number : number + 1]
            run = lambda row=row, more=more: model.generate(row, **options, **more)  # noqa: E731
            found = mixed[each * number : each * (number + 1)]
            assert torch.equal(found, alone(model, name, run))
    assert batch.current() is None


def test_padding_on_the_left_changes_no_text(model, luts, ids):
    with_two(model, luts)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    padded = ids.masked_fill(mask == 0, 0)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mixed = model.generate(padded, attention_mask=mask, adapter_names=NAMES, **options)
    run = lambda: model.generate(ids[1:2, 3:], **options)  # noqa: E731
    assert torch.equal(mixed[1, 6:], alone(model, BASE, run)[0, 3:])


def test_wrong_names_are_refused(model, luts, ids):
    with_two(model, luts)
    for names, message in (
        (["one"] * 3, "3 names, the batch 4"),
        (["one", "three", "two", "two"], "no adapter 'three'"),
        ("one", "a list"),
        ([], "a list"),
    ):
        for run in (model, model.generate):
            with pytest.raises(AdapterError, match=message):
                run(ids, adapter_names=names)
    assert batch.current() is None
    assert model(ids, adapter_names=None).logits.shape[0] == 4


def test_samples_are_counted_by_the_input_in_any_order(model, luts, ids):
    with_two(model, luts)
    positions = torch.arange(ids.shape[1])[None]
    inputs = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        expected = model(ids, adapter_names=NAMES).logits
        found = model(position_ids=positions, input_ids=ids, adapter_names=NAMES).logits
        assert torch.equal(found, expected)
        model(None, None, positions, inputs_embeds=inputs, adapter_names=NAMES)
    with pytest.raises(AdapterError, match="1 names, the batch 4"):
        model(position_ids=positions, input_ids=ids, adapter_names=["one"])


def test_compiled_models_follow_the_active_adapter_and_take_no_names(model, luts, ids):
    with_two(model, luts)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for name in ("one", "two", "one"):
            model.set_adapter(name)
            assert torch.equal(compiled(ids).logits, model(ids).logits)
    with pytest.raises(AdapterError, match="not compiled"):
        compiled(ids, adapter_names=NAMES)
    model.forward = torch.compile(model.forward, backend="eager")
    for run in (model, model.generate):
        with pytest.raises(AdapterError, match="not compiled"):
            run(ids, adapter_names=NAMES)


def test_a_failing_forward_forgets_the_names(model, luts, ids):
    with_two(model, luts)
    with pytest.raises(Exception):  # noqa: B017
        model(ids + 10**6, adapter_names=NAMES)
    assert batch.current() is None


def test_names_of_a_sketch_without_adapters_are_refused_but_the_base(model, ids):
    with torch.no_grad():
        assert torch.equal(model(ids, adapter_names=[BASE] * 4).logits, model(ids).logits)
    with pytest.raises(AdapterError, match="loaded: none"):
        model(ids, adapter_names=["a"] * 4)


def test_gradient_checkpointing_is_refused(model, luts, ids):
    with_two(model, luts)
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(AdapterError, match="checkpointing"):
        model(ids, adapter_names=NAMES)


def test_rows_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ValueError, match="5 rows"):
        batch.spread(torch.zeros(5, 3), ("a", "b"))


def test_a_bert_with_positions_works(folder, luts):
    model = with_two(sketchconv.load(folder("BertModel", embeddings=True)), luts)
    ids = torch.randint(3, 90, (4, 10))
    with torch.no_grad():
        mixed = model(ids, adapter_names=NAMES)
        for number, name in enumerate(NAMES):
            single = alone(model, name, lambda n=number: model(ids[n : n + 1]))
            assert torch.allclose(mixed[0][number], single[0][0], atol=1e-5)
            assert torch.allclose(mixed[1][number], single[1][0], atol=1e-5)


def random_linear(columns, rows, names=("a", "b")):
    module = SketchLinear(columns, rows, 4, 2, bias=False, lut_dtype=torch.float32)
    module.sketch_index.random_(0, 256)
    module.sketch_lut.data.normal_()
    for name in names:
        module.add_table(name, torch.randn_like(module.sketch_lut))
    return module.requires_grad_(False)


def test_experts_know_the_sample_of_each_token():
    torch.manual_seed(0)
    fused = nn.Module()
    fused.gate_up_proj = nn.Parameter(torch.zeros(3, 16, 12))
    fused.down_proj = nn.Parameter(torch.zeros(3, 12, 8))
    fused.act_fn = nn.SiLU()
    experts = Experts(fused, {"gate": "gate", "up": "up", "down": "down"})
    for number in range(3):
        for name, shape in (("gate", (12, 8)), ("up", (12, 8)), ("down", (8, 12))):
            experts.set_submodule(f"{number}.{name}", random_linear(*shape))
    names, tokens = ("a", BASE, "b"), 5
    x, routes = torch.randn(3, tokens, 12), torch.randint(0, 3, (3, tokens, 2))
    weights = torch.rand(3, tokens, 2)
    expected = []
    for number, name in enumerate(names):
        for module in experts.modules():
            if isinstance(module, SketchLinear):
                module.switch(name)
        expected.append(experts(x[number], routes[number], weights[number]))
    with batch.use(names):
        found = experts(x.flatten(0, 1), routes.flatten(0, 1), weights.flatten(0, 1))
        assert batch.current() == names
    assert torch.allclose(found, torch.cat(expected), atol=1e-4)


def test_shaped_sketches_have_scales_of_each_task():
    torch.manual_seed(0)
    module = ShapedLinear(128, 20, 4, next(g for g, k in GRIDS.items() if 4 in k.bits), 2)
    module.sketch_index.random_(0, 256)
    module.sketch_scale.data.normal_()
    module.add_table("a", torch.randn_like(module.sketch_scale), trainable=True)
    x = torch.randn(3, 2, 128)
    base = module(x)
    module.switch("a")
    other = module(x)
    with batch.use(("a", BASE, "a")):
        y = module(x)
    assert torch.allclose(y, torch.stack([other[0], base[1], other[2]]), atol=1e-5)
    module.switch(BASE)
    y.sum().backward()
    assert module.lut_of("a").grad.abs().sum() > 0


def test_on_a_gpu_its_kernel_of_tasks_runs(monkeypatch):
    module, calls = random_linear(48, 20), []
    x = torch.randn(4, 3, 48)
    with batch.use(("b", "a", "b", BASE)):
        expected = module(x)

        class Gpu:
            @staticmethod
            def multiply_tasks(x, index, luts, tasks, *, layout):
                calls.append((tuple(luts.shape), tasks.tolist(), layout))
                return plain.multiply_tasks(x, index, luts, tasks)

        monkeypatch.setattr(mixed, "gpu_kernels", lambda _: Gpu)
        monkeypatch.setattr(mixed.modes, "ordinary", lambda _: False)
        found = module(x)
    assert torch.allclose(found, expected, atol=1e-4)
    tasks = [t for t in (0, 1, 0, 2) for _ in range(3)]
    assert calls == [((3, 20, 2, 16), tasks, "planes-le")]
