"""A training run is a function of its configuration: repeatable, and resumable to the same bits."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kfacerr.exceptions import InputError
from studies.config import TrainingConfig, cosine_learning_rate
from studies.drivers import Driver
from studies.jobs import load_checkpoint, save_checkpoint
from studies.training import PADDING, Purpose, Training, crop_and_mirror, derived_seed
from tests.studies.helpers import assert_same_weights, tiny_dataset, tiny_training, weights

# The run.


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(stop: int, tmp_path: Path) -> None:
    whole = tiny_training()
    losses = [whole.step() for _ in range(8)]

    first = tiny_training()
    for _ in range(stop):
        first.step()
    save_checkpoint(tmp_path / "run.pt", first.state_dict())
    torch.manual_seed(12345)  # the state of the global generator must not matter
    second = tiny_training()
    second.load_state_dict(load_checkpoint(tmp_path / "run.pt"))
    assert second.k == stop
    rest = [second.step() for _ in range(stop, 8)]

    assert torch.equal(torch.stack(rest), torch.stack(losses[stop:]))
    assert_same_weights(whole, second)


def test_another_seed_gives_other_weights_batches_and_dropout() -> None:
    one, other = tiny_training(seed=1), tiny_training(seed=2)
    assert not torch.equal(one.model.fc0.weight, other.model.fc0.weight)
    assert not torch.equal(one.batch(0)[0], other.batch(0)[0])
    assert not torch.equal(one.step(), other.step())


def test_derived_seeds_differ_between_seeds_purposes_and_indices() -> None:
    seeds = {
        derived_seed(seed, purpose, index)
        for seed in range(4)
        for purpose in Purpose
        for index in (0, 1, 2, 10**6)
    }
    assert len(seeds) == 4 * len(Purpose) * 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_an_epoch_shows_each_image_at_most_once_in_an_order_of_its_own_and_drops_the_rest() -> None:
    training = tiny_training(augment=False)
    assert (training.steps_per_epoch, training.total_steps) == (3, 12)

    def images_of(epoch: int) -> Tensor:
        return torch.cat([training.batch(k)[0] for k in range(3 * epoch, 3 * epoch + 3)])

    first, second = images_of(0), images_of(1)
    assert len(first.flatten(1).unique(dim=0)) == 24
    assert not torch.equal(first, second)
    assert torch.equal(images_of(0), first)  # any batch may be asked for again, in any order


def test_batches_are_normalised_to_mean_0_and_deviation_1_of_each_channel() -> None:
    training = tiny_training(tiny_dataset(24), augment=False)
    images = torch.cat([training.batch(k)[0] for k in range(3)])
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0.0)


def test_constant_channels_stay_finite() -> None:
    dataset = tiny_dataset()
    dataset.train_images[:, 1] = 0
    assert tiny_training(dataset).batch(0)[0].isfinite().all()


def test_a_step_trains_on_the_batch_of_its_iteration_with_the_rate_of_its_epoch() -> None:
    training = tiny_training(learning_rate=0.1)
    for k in range(5):
        training.model.eval()  # no dropout, and BatchNorm as it stands: the loss can be worked out here
        images, labels = training.batch(k)
        with torch.no_grad():
            expected = torch.nn.functional.cross_entropy(training.model(images), labels)
        assert torch.equal(training.step(), expected)
        rate = cosine_learning_rate(k // 3, 4, 0.1)
        assert training.optimizer.param_groups[0]["lr"] == rate
    assert (training.k, training.epoch) == (5, 1)


def test_gradients_are_still_there_after_the_step() -> None:
    training = tiny_training()
    training.step()
    assert training.model.fc0.weight.grad is not None


def test_training_learns_the_images_it_sees() -> None:
    training = tiny_training(tiny_dataset(8), epochs=60, augment=False, width=1 / 16)
    losses = [training.step().item() for _ in range(60)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("was_training", [True, False])
def test_evaluation_leaves_the_run_as_it_was(was_training: bool) -> None:
    watched, undisturbed = tiny_training(), tiny_training()
    for training in (watched, undisturbed):
        training.step()
        training.model.train(was_training)
    before, state = weights(watched), torch.get_rng_state()
    loss, accuracy = watched.evaluate()
    assert watched.model.training is was_training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(watched), strict=True))
    assert math.isfinite(loss)
    assert 0 <= accuracy <= 1
    assert torch.equal(watched.step(), undisturbed.step())
    assert_same_weights(watched, undisturbed)


def test_evaluation_averages_over_the_test_set_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    training = tiny_training()
    dataset = tiny_dataset()
    mean, std = (x.float().view(3, 1, 1) for x in dataset.channel_statistics())
    training.model.eval()
    with torch.no_grad():
        logits = training.model((dataset.test_images / 255 - mean) / std)
    monkeypatch.setattr("studies.training._EVALUATION_BATCH", 3)  # the last batch is smaller
    loss, accuracy = training.evaluate()
    expected = torch.nn.functional.cross_entropy(logits, dataset.test_labels)
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert accuracy == (logits.argmax(1) == dataset.test_labels).double().mean().item()


# Augmentation.


def test_crops_are_windows_of_the_padded_image_mirrored_where_asked() -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (30, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tops, lefts = torch.randint(2 * PADDING + 1, (2, 30), generator=generator)
    tops[:2], lefts[:2] = torch.tensor([0, 8]), torch.tensor([8, 0])  # the extremes, each way
    mirror = torch.arange(30) % 3 == 0
    result = crop_and_mirror(images, tops, lefts, mirror)
    for i in range(30):
        padded = torch.zeros(3, 40, 40, dtype=torch.uint8)
        padded[:, 4:36, 4:36] = images[i]
        window = padded[:, tops[i] : tops[i] + 32, lefts[i] : lefts[i] + 32]
        assert torch.equal(result[i], window.flip(2) if mirror[i] else window)


def test_the_augmentation_draws_every_crop_and_mirrors_half() -> None:
    training = tiny_training(tiny_dataset(500), batch_size=500)
    tops, lefts, mirror = training._augmentation(0)
    assert set(tops.tolist()) == set(lefts.tolist()) == set(range(9))
    assert 200 < mirror.sum() < 300
    assert not torch.equal(training._augmentation(1)[0], tops)


def test_images_that_may_not_be_mirrored_are_not() -> None:
    training = tiny_training(tiny_dataset(500, mirrored=False), batch_size=500)
    assert not training._augmentation(0)[2].any()


# What is refused.


def test_a_diverged_run_names_the_iteration_and_leaves_no_checkpoint() -> None:
    training = tiny_training()
    training.step()
    with torch.no_grad():
        training.model.fc1.bias.fill_(math.nan)
    training.step()
    with pytest.raises(InputError, match=r"the loss is nan at iteration 1 \(epoch 0\)"):
        training.state_dict()


def test_a_diverged_run_stops_at_the_end_of_the_epoch_at_the_latest() -> None:
    training = tiny_training()
    with torch.no_grad():
        training.model.fc1.bias.fill_(math.inf)
    training.step()
    training.step()
    with pytest.raises(InputError, match="at iteration 0"):
        training.step()


def test_a_checkpoint_of_another_configuration_is_refused_with_what_differs() -> None:
    state = tiny_training(seed=1).state_dict()
    with pytest.raises(InputError, match="seed = 1, not 2"):
        tiny_training(seed=2).load_state_dict(state)
    with pytest.raises(InputError, match="n_train = 27, not 20"):
        tiny_training(tiny_dataset(20), seed=1).load_state_dict(state)


def test_a_run_ends_after_its_last_epoch() -> None:
    training = tiny_training(epochs=1)
    for _ in range(training.total_steps):
        training.step()
    with pytest.raises(InputError, match="iteration 3 is past the end"):
        training.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 28}, "27 train images do not fill a batch of 28"),
        ({"driver": "adam"}, "no driver is called 'adam': it is none of .*SGD"),
        ({"device": "gpu"}, "'gpu' is not the name of a device"),
        ({"device": "cuda:99"}, "device 'cuda:99' is asked for, but there are"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_training(**settings)


def test_a_driver_of_ones_own_takes_the_place_of_the_named_one() -> None:
    own = Driver(lambda model, *_: torch.optim.Adam(model.parameters()), lambda _, epoch: 0.5**epoch)
    training = Training(TrainingConfig(8, 4, width=1 / 32, device="cpu"), tiny_dataset(), own)
    for _ in range(4):
        training.step()
    assert isinstance(training.optimizer, torch.optim.Adam)
    assert training.optimizer.param_groups[0]["lr"] == 0.5
