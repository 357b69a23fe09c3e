"""`LutTrainer`: transformers' Trainer with what LUTs need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState

from sketchconv.recovery.attention import quicker_attention
from sketchconv.recovery.products import Products, decoded
from sketchconv.recovery.room import weights_fit
from sketchconv.runtime.modules import SketchLinear
from sketchconv.tuning import checkpoints
from sketchconv.tuning.callbacks import BrokenStop
from sketchconv.tuning.masters import rounded_masters, training_of
from sketchconv.tuning.optimizer import DEFAULT_OPTIMIZER, OptimizerName, lut_optimizer
from sketchconv.tuning.samples import IGNORED


class LutTrainer(Trainer):
    """A Trainer for a model that `prepare_for_lut_training` has seen; all else is transformers'.

    - The optimizer is `LutMuon` or `LutAdamW`, unless one is given; training stops at a gradient
      that is not finite, before the LUTs have it (`broken_at`).
    - Evaluation measures the values that would be shipped: LUTs rounded to their file's dtype. The
      loss is the mean over all tokens that count, not over batches.
    - Checkpoints hold LUTs, the optimizer's state and random numbers as safetensors: no model, no
      pickle.
    - Each weight is decoded once per step where memory allows, as in recovery.

    Args:
        lut_optimizer: "adamw" or "muon".
        relative: see `LutMuon` and `LutAdamW`.
        cache_weights: keep all trained weights decoded during a step (2 bytes per weight in
            bfloat16); None does where that takes at most a sixth of the machine's memory, or
            a third of the free memory of a GPU.
    """

    def __init__(
        self,
        *args: Any,
        lut_optimizer: OptimizerName = DEFAULT_OPTIMIZER,
        relative: bool = True,
        cache_weights: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        network: Any = self.model
        self.training = training_of(network)
        self.lut_optimizer = lut_optimizer
        self.relative = relative
        self.cache_weights = cache_weights
        self._products: Products | None = None
        self._seen: int | None = None  # the step whose LUTs are decoded
        self._stop = BrokenStop()
        self.add_callback(self._stop)

    @property
    def broken_at(self) -> int | None:
        """The step whose gradient was not finite, if there was one."""
        return self._stop.at

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """With the arguments' learning rate and weight decay; AdamW's betas and epsilon too."""
        if self.optimizer is None:
            args = self.args
            options: dict[str, Any] = {"weight_decay": args.weight_decay}
            if self.lut_optimizer == "adamw":
                options["betas"] = (args.adam_beta1, args.adam_beta2)
                options["eps"] = args.adam_epsilon
            network: Any = self.model
            self.optimizer = lut_optimizer(
                network,
                args.learning_rate,
                optimizer=self.lut_optimizer,
                relative=self.relative,
                **options,
            )
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, with decoded weights."""
        with self._decoded():
            return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `Trainer.training_step`, with the LUTs' present values."""
        if self._products is not None and self._stale():
            self._products.refresh()
        with quicker_attention():
            loss: Tensor = super().training_step(*args, **kwargs)
        return loss

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss per learned token of the rounded LUTs, as `{"eval_loss": ...}`, in nats."""
        loader = self.get_eval_dataloader(eval_dataset)
        with self._decoded(), rounded_masters(self.training.masters):
            if self._products is not None:
                self._products.refresh()
            loss = self._measured(loader)
        self._seen = None  # the masters are other values again
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _measured(self, loader: Any) -> float:
        model: Any = self.model
        model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in loader:
                inputs = self._prepare_inputs(batch)
                count = int((inputs["labels"][:, 1:] != IGNORED).sum())
                loss = float(model(**inputs, use_cache=False).loss) if count else 0.0
                total += torch.tensor([loss * count, count], dtype=torch.float64)
        summed: Any = self.accelerator.reduce(total.to(self.args.device), "sum")
        return float(summed[0] / summed[1].clamp(min=1))

    @contextmanager
    def _decoded(self) -> Iterator[None]:
        """Decoded weights for as long as this lasts; inner contexts use those of the outer one."""
        if self._products is not None:
            yield
            return
        layers = [m.module for m in self.training.masters if isinstance(m.module, SketchLinear)]
        dtype = torch.bfloat16 if self.args.bf16 else layers[0].dtype if layers else None
        fit = self.cache_weights
        if dtype is not None and fit is None:
            fit = weights_fit(layers, dtype)
        with decoded(layers, dtype if fit else None) as products:
            self._products, self._seen = products, None
            try:
                yield
            finally:
                self._products = None

    def _stale(self) -> bool:
        """Whether an optimizer's step was made since the weights were decoded."""
        seen, self._seen = self._seen, self.state.global_step
        return seen != self._seen

    def restore(self, checkpoint: Path, state: TrainerState) -> None:
        """Be as after the training that ended with this checkpoint: the best LUTs in place."""
        self.state = state
        checkpoints.load_masters(checkpoint, self.training.masters)
        if state.best_model_checkpoint is not None:
            self._load_best_model()
        self.callback_handler.on_train_begin(self.args, self.state, self.control)

    # ---- checkpoints: names and arguments are those of transformers' own methods ----

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            checkpoints.save_masters(folder, self.training.masters)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        checkpoints.load_masters(Path(resume_from_checkpoint), self.training.masters)

    def _load_best_model(self) -> None:
        checkpoints.load_masters(Path(str(self.state.best_model_checkpoint)), self.training.masters)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            names = [master.name for master in self.training.masters]
            scheduler: Any = self.lr_scheduler
            schedule = _plain(scheduler.state_dict())
            checkpoints.save_optimizer(Path(output_dir), self.optimizer, schedule, names)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            names = [master.name for master in self.training.masters]
            schedule = checkpoints.load_optimizer(Path(checkpoint), self.optimizer, names)
            scheduler: Any = self.lr_scheduler
            scheduler.load_state_dict({**scheduler.state_dict(), **schedule})

    def _save_rng_state(self, output_dir: str) -> None:
        checkpoints.save_random(Path(output_dir), self.args.process_index)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_random(Path(checkpoint), self.args.process_index)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """What JSON can hold of a schedule's state; its functions are made anew."""
    simple = (bool, int, float, str, type(None))
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, simple)
        or (isinstance(value, list) and all(isinstance(item, simple) for item in value))
    }
