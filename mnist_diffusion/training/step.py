"""One optimizer update, and the state it changes: network, optimizer, averages."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from mnist_diffusion.config import RunConfig
from mnist_diffusion.data.dataset import ImageData, draw_batch
from mnist_diffusion.data.transforms import to_model_range
from mnist_diffusion.method.network import PatchedUNet, patch_size_of
from mnist_diffusion.method.objective import Batch, Objective
from mnist_diffusion.seeds import mixed_seed
from mnist_diffusion.training.checkpoint import Checkpoint, CheckpointError, optimizer_state, restore_optimizer
from mnist_diffusion.training.ema import PowerAverages
from mnist_diffusion.training.optimizer import build_optimizer
from mnist_diffusion.training.run_folder import NOISE_LEVELS


class TrainState:
    """A network in training, with its optimizer and its averages.

    Args:
        config: the run.
        accelerator: device, precision and processes.
        data: the images.
        unet: the network with its first weights.
        objective: the training objective.
    """

    def __init__(
        self, config: RunConfig, accelerator: Accelerator, data: ImageData, unet: UNet2DModel, objective: Objective
    ):
        self.config, self.accelerator, self.data, self.objective = config, accelerator, data, objective
        unet.to(accelerator.device)
        if config.train.channels_last:
            unet.to(memory_format=torch.channels_last)
        # Without dropout both modes are one function, and in training mode diffusers leaves channels-last.
        drops = any(isinstance(each, nn.Dropout) and each.p > 0 for each in unet.modules())
        self.training_mode = drops or not config.train.channels_last
        self.averaged_unet = copy.deepcopy(unet).eval().requires_grad_(False)
        self.ema = EMAModel(unet.parameters(), decay=config.train.ema_decay, foreach=True)
        self.power_averages = None if config.train.averages_every is None else PowerAverages(unet)
        self.unet, patch_size = unet, patch_size_of(unet, channels=data.channels)
        model = PatchedUNet(unet, patch_size)
        if config.train.compile:
            model.compile(**({"mode": "reduce-overhead"} if accelerator.device.type == "cuda" else {}))
        self.model, self.optimizer = accelerator.prepare(model, build_optimizer(unet, config.train))
        self.averaged_model = PatchedUNet(self.averaged_unet, patch_size).eval()
        # Read when the run logs or saves, so that no step waits for the device: -1 while every step was finite.
        self.first_non_finite_step = torch.tensor(-1, device=accelerator.device)
        self.loss_by_noise = torch.zeros(2, NOISE_LEVELS, device=accelerator.device)  # sums and counts

    def update(self, step: int, learning_rate: float) -> dict[str, Tensor]:
        """Do optimizer update `step`, counted from 0.

        With `train.on_non_finite: skip`, an update that is not finite on some process changes nothing.

        Returns:
            Scalars on the device: `loss`, this process's mean; `grad_norm` before clipping; `skipped`, 0 or 1, if
            updates may be skipped.
        """
        train, accelerator = self.config.train, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        batch = self._batch_of_step(step)
        micro_batches = train.gradient_accumulation_steps
        size, losses = len(batch.labels) // micro_batches, []
        for micro in range(micro_batches):
            part, last = batch[micro * size : (micro + 1) * size], micro == micro_batches - 1
            torch.manual_seed(mixed_seed(train.seed, "dropout", step, micro, accelerator.process_index))
            with nullcontext() if last else accelerator.no_sync(self.model):
                loss = self.training_loss(part)
                accelerator.backward(loss.mean() / micro_batches)
            self._count_by_noise_level(loss.detach(), part.timesteps)
            losses.append(loss.detach().mean())
        limit = math.inf if train.max_grad_norm is None else train.max_grad_norm
        grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), limit).detach()
        metrics = {"loss": torch.stack(losses).mean(), "grad_norm": grad_norm}
        # With a gradient scaler gradients may overflow, so that only the loss counts.
        counted = list(metrics.values()) if accelerator.scaler is None else [metrics["loss"]]
        bad, first = ~torch.isfinite(torch.stack(counted)).all(), self.first_non_finite_step
        self.first_non_finite_step = torch.where((first < 0) & bad, step + 1, first)
        skipped = False
        if train.on_non_finite == "skip":
            skipped = bool(accelerator.reduce(bad.float(), reduction="sum"))
            metrics["skipped"] = torch.tensor(float(skipped), device=accelerator.device)
        if not skipped or accelerator.scaler is not None:  # a gradient scaler skips by itself, and must be told
            self.optimizer.step()
        if not skipped:
            self.ema.step(self.unet.parameters())
            if self.power_averages is not None:
                self.power_averages.update(self.unet.parameters(), step + 1)
        self.optimizer.zero_grad()
        return metrics

    def training_loss(self, batch: Batch) -> Tensor:
        """The loss of each image, `[B]`, in the precision of the run."""
        self.model.train(self.training_mode)
        with self.accelerator.autocast():
            return self.objective.loss(self.model, batch)

    def _batch_of_step(self, step: int) -> Batch:
        """This process's share of a step's batch. Randomness is drawn for all, whatever the number of processes."""
        config, accelerator = self.config, self.accelerator
        share, rank = config.data.batch_size // accelerator.num_processes, accelerator.process_index
        mine = slice(rank * share, (rank + 1) * share)
        images, labels = draw_batch(self.data.train, config.data, seed=config.train.seed, step=step, part=mine)
        shape = (config.data.batch_size, *images.shape[1:])
        draws = self.objective.draw(shape, seed=config.train.seed, step=step, device=accelerator.device)
        return self.batch(images, labels, *(each[mine] for each in draws))

    def batch(self, images: Tensor, labels: Tensor, *draws: Tensor) -> Batch:
        """Images, uint8 `[B, C, H, W]`, and labels on the device, with their draws."""
        images, labels = (each.to(self.accelerator.device, non_blocking=True) for each in (images, labels))
        return Batch(to_model_range(images), labels, *draws)

    def _count_by_noise_level(self, losses: Tensor, timesteps: Tensor) -> None:
        levels = timesteps * NOISE_LEVELS // self.objective.num_timesteps
        self.loss_by_noise[0].index_add_(0, levels, losses.float())
        self.loss_by_noise[1].index_add_(0, levels, torch.ones_like(losses, dtype=torch.float32))

    def pop_loss_by_noise_level(self) -> list[float | None] | None:
        """Mean loss since the last call at each tenth of the timesteps, the least noisy first, over all processes.

        None if the objective has fewer than ten timesteps; None for a tenth without images.
        """
        if self.objective.num_timesteps < NOISE_LEVELS:
            return None
        sums, counts = self.accelerator.reduce(self.loss_by_noise, reduction="sum").tolist()
        self.loss_by_noise = torch.zeros_like(self.loss_by_noise)
        pairs = zip(sums, counts, strict=True)
        return [total / count if count and math.isfinite(total) else None for total, count in pairs]

    def update_averaged_unet(self) -> UNet2DModel:
        """Copy the averaged weights into `averaged_unet`, which is in evaluation mode, and return it."""
        self.ema.copy_to(self.averaged_unet.parameters())
        return self.averaged_unet

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss of the averaged weights on a fixed set of held-out images, with fixed noise and timesteps.

        The batch size is fixed too, so that the results of different runs are comparable.
        """
        self.update_averaged_unet()
        train, device, total = self.config.train, self.accelerator.device, 0.0
        split = self.data.test.spread(train.num_eval_images)
        for index, (images, labels) in enumerate(zip(*(each.split(500) for each in split), strict=True)):
            draws = self.objective.draw(tuple(images.shape), seed=train.seed, step=index, device=device, held_out=True)
            batch = self.batch(images, labels, *draws)
            total += float(self.objective.loss(self.averaged_model, batch).mean()) * len(images)
        return total / len(split[1])

    def save_power_averages(self, folder: Path, step: int) -> None:
        """Write the power-function averages of this step into a run folder."""
        if self.power_averages is not None:
            self.power_averages.write(folder, step)

    def to_checkpoint(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Everything to resume from: tensors by file and name, and values for JSON."""
        names = [name for name, _ in self.unet.named_parameters()]
        averaged = dict(zip(names, self.ema.shadow_params, strict=True))
        tensors = {"unet": dict(self.unet.state_dict()), "ema": averaged, "optimizer": optimizer_state(self.optimizer)}
        if self.power_averages is not None:
            tensors["averages"] = self.power_averages.tensors()
        scaler = None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        return tensors, {"ema_step": self.ema.optimization_step, "grad_scaler": scaler}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load the state of a checkpoint.

        Raises:
            CheckpointError: it lacks the averages that the configuration needs.
        """
        tensors, state = checkpoint.tensors, checkpoint.state
        if self.power_averages is not None:
            if "averages" not in tensors:
                option = f"train.averages_every={self.config.train.averages_every!r}"
                raise CheckpointError(f"{option} needs averages from the first step on, and {checkpoint.path} has none")
            self.power_averages.restore(tensors["averages"])
        self.unet.load_state_dict(tensors["unet"])
        averaged = [tensors["ema"][name] for name, _ in self.unet.named_parameters()]
        torch._foreach_copy_(self.ema.shadow_params, averaged)
        self.ema.optimization_step = int(state["ema_step"])
        restore_optimizer(self.optimizer.optimizer, tensors["optimizer"])
        if self.accelerator.scaler is not None and state["grad_scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["grad_scaler"])
