"""A prepared model in the trainers of others: transformers, trl, accelerate."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import sketchconv
from sketchconv.tuning.masters import finish_lut_training, training_of, tuned_luts
from sketchconv.tuning.optimizer import lut_optimizer

WINDOW = 24


def rows(makers, path, count=16):
    ids = sketchconv.load_tokenizer(path)(makers.text).input_ids
    windows = [ids[at : at + WINDOW] for at in range(0, count * WINDOW, WINDOW)]
    return [{"input_ids": list(w), "labels": list(w)} for w in windows]


def arguments(folder, **changes):
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 3e-4,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        **changes,
    }
    return TrainingArguments(**values)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def frozen(model):
    return {n: t.clone() for n, t in model.state_dict().items() if not n.endswith("sketch_lut")}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bf16": True},
        {"activation_checkpointing": True},
        {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": True},
        },
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
    ids=["plain", "bf16", "checkpointing", "reentrant", "accumulation"],
)
def test_trainer_takes_the_model_as_it_is(tiny, makers, tmp_path, changes):
    model = sketchconv.prepare_for_lut_training(sketchconv.load(tiny))
    before = frozen(model)
    trainer = Trainer(model, arguments(tmp_path, **changes), train_dataset=rows(makers, tiny))
    trainer.train()
    assert len(losses(trainer)) == 4
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    base = luts_of(tiny)
    moved = {n for n, t in tuned_luts(model).items() if not torch.equal(t, base[n])}
    assert len(moved) == 14  # the first block too, under reentrant checkpointing


def luts_of(path):
    """LUTs of the file, by weight name."""
    model = sketchconv.load(path)
    records = model.hf_quantizer.records
    return {r.name: model.get_submodule(p).sketch_lut.detach() for p, r in records.items()}


def test_with_the_optimizer_of_luts(tiny, makers, tmp_path):
    model = sketchconv.prepare_for_lut_training(sketchconv.load(tiny))
    optimizer = lut_optimizer(model, 1e-2)
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=rows(makers, tiny),
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.05


def test_checkpoints_resume_and_best_model(tiny, makers, tmp_path):
    """Checkpoints of the plain Trainer are whole sketches with float32 LUTs."""
    options = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
    }
    data = rows(makers, tiny)
    found = []
    for folder, resume in ((tmp_path / "a", None), (tmp_path / "a", "checkpoint-2")):
        model = sketchconv.prepare_for_lut_training(sketchconv.load(tiny))
        trainer = Trainer(
            model, arguments(folder, **options), train_dataset=data, eval_dataset=data[:4]
        )
        trainer.train(resume_from_checkpoint=resume and str(folder / resume))
        found.append(tuned_luts(model))
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    first, second = found
    assert all(torch.equal(first[n], second[n]) for n in first)
    saved = sketchconv.load(tmp_path / "a" / "checkpoint-4")
    masters = {m.name: m.parameter for m in training_of(trainer.model).masters}
    records = saved.hf_quantizer.records
    for path, record in records.items():
        assert torch.equal(saved.get_submodule(path).sketch_lut, masters[record.name])
    finish_lut_training(trainer.model)
    trainer.model.save_pretrained(tmp_path / "tuned")
    again = sketchconv.load(tmp_path / "tuned")
    ids = torch.tensor([data[0]["input_ids"]])
    assert torch.equal(again(ids).logits, trainer.model.eval()(ids).logits)


def test_sft_trainer_takes_the_model_as_it_is(tiny, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer = sketchconv.load_tokenizer(tiny)
    turns = [
        {
            "prompt": [{"role": "user", "content": f"say {n}"}],
            "completion": [{"role": "assistant", "content": f"it is {n}."}],
        }
        for n in range(16)
    ]
    config = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        max_length=64,
        completion_only_loss=True,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
    )
    model = sketchconv.prepare_for_lut_training(sketchconv.load(tiny))
    before = frozen(model)
    trainer = trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(turns),
        processing_class=tokenizer,
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())


SCRIPT = """
import sys
import torch
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments
import sketchconv
from sketchconv.tuning.masters import training_of

base, out, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
model = sketchconv.prepare_for_lut_training(sketchconv.load(base))
generator = torch.Generator().manual_seed(3)
ids = torch.randint(6, 40, (8, 24), generator=generator).tolist()
trained = [master.parameter for master in training_of(model).masters]
optimizer = torch.optim.SGD(trained, lr=1.0)
arguments = TrainingArguments(
    output_dir=out + ".work", per_device_train_batch_size=batch, max_steps=2, use_cpu=True,
    report_to="none", disable_tqdm=True, save_strategy="no", lr_scheduler_type="constant",
    max_grad_norm=0.0, train_sampling_strategy="sequential",
)
data = [{"input_ids": row, "labels": row} for row in ids]
trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
trainer.train()
tables = {m.name: m.parameter.detach().clone() for m in training_of(model).masters}
if trainer.is_world_process_zero():
    save_file(tables, out)
print(f"processes: {trainer.args.world_size}")
"""


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tiny, tmp_path, monkeypatch):
    """`accelerate launch` on the CPU (gloo). The gradients differ by the order of float32 sums."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", [str(script), str(tiny), str(files[0]), "4"])
    runpy.run_path(str(script))
    torch.set_num_threads(threads)
    # `--cpu` starts one process only; what is launched for GPUs runs on CPUs with this variable.
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = "-P -m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    launch += f" --mixed_precision no --dynamo_backend no --main_process_port {free_port()}"
    done = subprocess.run(
        [sys.executable, *launch.split(), str(script), str(tiny), str(files[1]), "2"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("processes: 2") == 2
    one, two = (load_file(file) for file in files)
    base = luts_of(tiny)
    for name, table in one.items():
        moved = float((table - base[name].float()).abs().max())
        assert moved > 0
        assert float((table - two[name]).abs().max()) <= 1e-4 * moved


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]
