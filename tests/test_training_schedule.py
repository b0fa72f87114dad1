"""What a step trains on and how fast depends on its number alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest

torch = pytest.importorskip("torch", reason="the train extra is not installed")

from spctrl.training.config import TrainingConfig  # noqa: E402
from spctrl.training.schedule import (  # noqa: E402
    Schedule,
    base_learning_rate,
    learning_rate_factor,
    make_schedule,
    token_learning_rate,
)


def config(**settings: Any) -> TrainingConfig:
    given = {"dataset_name": "ap10k", "conditioning_mode": "spatext", **settings}
    return msgspec.convert(given, TrainingConfig)


def schedule(*, images: int = 10, processes: int = 1, **settings: Any) -> Schedule:
    return make_schedule(config(**settings), images=images, processes=processes)


def epoch_of(plan: Schedule, epoch: int, process: int = 0) -> list[list[int]]:
    return plan.batches(epoch * plan.steps_per_epoch, process)


def test_an_epoch_has_each_image_and_fills_its_last_step_up() -> None:
    plan = schedule(images=10, train_batch_size=4, num_train_epochs=3)
    assert (plan.steps_per_epoch, plan.total_steps) == (3, 9)
    counts = Counter(image for batch in epoch_of(plan, 0) for image in batch)
    assert [len(batch) for batch in epoch_of(plan, 0)] == [4, 4, 4]
    assert set(counts) == set(range(10))
    assert sum(counts.values()) == 12
    assert max(counts.values()) == 2


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    plan, other = schedule(train_batch_size=5), schedule(train_batch_size=5, seed=1)
    orders = [
        epoch_of(plan, 0),
        epoch_of(schedule(train_batch_size=5, num_train_epochs=2), 1),
        epoch_of(other, 0),
    ]
    assert len({str(order) for order in orders}) == 3


@pytest.mark.parametrize("first_step", range(6))
def test_a_run_that_goes_on_sees_the_images_of_one_that_was_left_alone(first_step: int) -> None:
    plan = schedule(images=10, train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2)
    epoch, step_in_epoch = divmod(first_step, plan.steps_per_epoch)
    assert plan.batches(first_step, 0) == epoch_of(plan, epoch)[2 * step_in_epoch :]


def test_a_step_has_the_same_images_however_they_are_shared_out() -> None:
    def first_step(**how: Any) -> set[int]:
        plan = schedule(images=12, num_train_epochs=1, **how)
        batches = [
            batch
            for process in range(plan.processes)
            for batch in plan.batches(0, process)[: plan.micro_batches]
        ]
        assert plan.step_images == 4
        return {image for batch in batches for image in batch}

    whole = first_step(train_batch_size=4)
    assert len(whole) == 4
    assert first_step(train_batch_size=2, gradient_accumulation_steps=2) == whole
    assert first_step(train_batch_size=1, gradient_accumulation_steps=2, processes=2) == whole


def test_fewer_images_than_a_step_has() -> None:
    assert epoch_of(schedule(images=2, train_batch_size=5, num_train_epochs=1), 0)[0] in (
        [0, 1, 0, 1, 0],
        [1, 0, 1, 0, 1],
    )


def test_max_train_steps_end_a_run_within_an_epoch() -> None:
    plan = schedule(images=10, train_batch_size=2, max_train_steps=7)
    assert plan.total_steps == 7
    assert len(plan.batches(5, 0)) == 2


def test_the_rate_of_the_tokens_falls_as_the_reference_says() -> None:
    settings = config(
        enable_learnable_kpttoken=True,
        add_keypoint_prompt=1,
        text_encoder_lr=0.5,
        text_encoder_lr_scheduler=0.5,
        train_batch_size=5,
        num_train_epochs=400,
    )
    plan = make_schedule(settings, images=10, processes=1)
    assert plan.steps_per_epoch == 2
    # After a step of epoch e: 0.5 * 0.5 ** (int((e + 1) / 100) + 1).
    expected = {0: 0.5, 1: 0.25, 2: 0.25, 198: 0.25, 199: 0.125, 398: 0.125, 399: 0.0625}
    assert {step: token_learning_rate(settings, plan, step) for step in expected} == expected


def test_the_rate_of_the_tokens_without_a_schedule() -> None:
    plan = schedule()
    assert token_learning_rate(config(text_encoder_lr=0.5), plan, 5) == 0.5
    assert token_learning_rate(config(learning_rate=0.1), plan, 5) == 0.1


def test_scale_lr_counts_the_images_of_a_step() -> None:
    settings = config(learning_rate=0.5, scale_lr=True, train_batch_size=3, gradient_accumulation_steps=2)
    assert base_learning_rate(settings, make_schedule(settings, images=100, processes=4)) == 12


def test_learning_rates_are_those_of_diffusers_schedules() -> None:
    pytest.importorskip("diffusers")
    from diffusers.optimization import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=3, num_training_steps=10)
    factor = learning_rate_factor(config(lr_scheduler="cosine", lr_warmup_steps=3), total_steps=10)
    for step in range(10):
        assert factor(step) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
