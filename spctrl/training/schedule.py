"""What a step trains on and how fast, as functions of its number alone.

Neither the order of the images, nor what is drawn at random, nor a learning rate depends on the steps before it. So a
run that goes on from a checkpoint needs no more than the number of its next step to go on as if it had not stopped.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from spctrl.training.config import TrainingConfig

EPOCHS_PER_DECAY = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How a run goes through its images.

    Attributes:
        images: their number.
        batch_size: images of a micro-batch, in each process.
        micro_batches: of a step.
        processes: that train together.
        total_steps: of the run.
        seed: of the order.
    """

    images: int
    batch_size: int
    micro_batches: int
    processes: int
    total_steps: int
    seed: int

    @property
    def step_images(self) -> int:
        """Images of a step, in all processes."""
        return self.batch_size * self.micro_batches * self.processes

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.images / self.step_images)

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to, from 0."""
        return step // self.steps_per_epoch

    def epoch_end(self, epoch: int) -> int:
        """The first step after an epoch, or after the run."""
        return min((epoch + 1) * self.steps_per_epoch, self.total_steps)

    def batches(self, first_step: int, process: int) -> list[list[int]]:
        """Positions of the images of one process: its micro-batches from a step to the end of the step's epoch.

        Each epoch has its own order. Its last step is filled up with the epoch's first images, so that all steps are
        alike.
        """
        epoch = self.epoch(first_step)
        generator = torch.Generator().manual_seed(random_seed(self.seed, "order", epoch))
        order = torch.randperm(self.images, generator=generator).tolist()
        steps = range(first_step, self.epoch_end(epoch))
        size = self.batch_size
        batches = []
        for step in steps:
            start = (step - epoch * self.steps_per_epoch) * self.step_images
            for micro in range(self.micro_batches):
                first = start + (micro * self.processes + process) * size
                batches.append([order[position % self.images] for position in range(first, first + size)])
        return batches


def make_schedule(config: TrainingConfig, *, images: int, processes: int) -> Schedule:
    """The schedule of a configuration for a number of images and processes."""
    schedule = Schedule(
        images=images,
        batch_size=config.train_batch_size,
        micro_batches=config.gradient_accumulation_steps,
        processes=processes,
        total_steps=0,
        seed=config.seed,
    )
    total_steps = config.max_train_steps or config.num_train_epochs * schedule.steps_per_epoch
    return replace(schedule, total_steps=total_steps)


def random_seed(*names: object) -> int:
    """A seed of 63 bits that differs wherever the names do."""
    text = " ".join(map(str, names)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def base_learning_rate(config: TrainingConfig, schedule: Schedule) -> float:
    """The learning rate of the control network before its schedule."""
    return config.learning_rate * (schedule.step_images if config.scale_lr else 1)


def learning_rate_factor(config: TrainingConfig, total_steps: int) -> Callable[[int], float]:
    """What the learning rate of the control network is multiplied by in each step; diffusers' schedules."""
    from diffusers.optimization import get_scheduler

    # The schedules are functions that only come attached to an optimizer.
    carrier = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = get_scheduler(
        config.lr_scheduler,
        carrier,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=total_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor


def token_learning_rate(config: TrainingConfig, schedule: Schedule, step: int) -> float:
    """The learning rate of the token embeddings in a step (REFERENCE section 10, ``text_encoder_lr_scheduler``)."""
    rate = config.text_encoder_lr or config.learning_rate
    if config.text_encoder_lr_scheduler is None or step == 0:
        return rate
    decays = (schedule.epoch(step - 1) + 1) // EPOCHS_PER_DECAY + 1
    return rate * config.text_encoder_lr_scheduler**decays


def learning_rates(config: TrainingConfig, schedule: Schedule) -> Callable[[int], dict[str, float]]:
    """The learning rates of a step, from 0, by group of trained parameters."""
    base = base_learning_rate(config, schedule)
    factor = learning_rate_factor(config, schedule.total_steps)

    def rates(step: int) -> dict[str, float]:
        control = {"control": base * factor(step)}
        if not config.enable_learnable_kpttoken:
            return control
        return {**control, "tokens": token_learning_rate(config, schedule, step)}

    return rates
