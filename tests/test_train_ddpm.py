"""The real train() with a table of noise levels; the model is the fake architecture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image

from library.options.ddpm import DdpmTrainingOptions
from library.options.loss import LossOptions
from library.training.loss.ddpm import DdpmObjective
from tests.tiny_arch import TinyTrainer
from tests.tiny_runs import TinyRuns, same_tensors

PRESERVED = {"diff_output_preservation": True}


class TableTrainer(TinyTrainer):
    """Keeps a batch of two images, so that a test can compute with it when the run is over."""

    DDPM: ClassVar[DdpmTrainingOptions] = DdpmTrainingOptions(
        v_parameterization=True, zero_terminal_snr=True, min_snr_gamma=5.0, scale_v_pred_loss_like_noise_pred=True
    )
    LOSS: ClassVar[str] = "l2"
    kept: Any = None

    def create_objective(self):
        loss = LossOptions(loss_type=self.LOSS)  # of a schedule that the options of flow models refuse
        return DdpmObjective(self.DDPM, self.options.noise, loss)

    def backward(self, batch, micro_step, *, parts):
        if len(batch.item_keys) == 2:
            self.kept = batch
        return super().backward(batch, micro_step, parts=parts)


class NoiseTrainer(TableTrainer):
    DDPM: ClassVar[DdpmTrainingOptions] = DdpmTrainingOptions(debiased_estimation_loss=True)


class HuberTrainer(TableTrainer):
    LOSS: ClassVar[str] = "huber"


@pytest.fixture
def runs(picture_folder, tmp_path) -> TinyRuns:
    pictures = picture_folder(4)
    for path in pictures.glob("*.png"):
        Image.open(path).resize((64, 64)).save(path)
    return TinyRuns(tmp_path, pictures)


@pytest.mark.parametrize("trainer_class", [TableTrainer, NoiseTrainer])
def test_a_preserved_image_has_another_target_and_the_same_weights(runs, trainer_class):
    trainer = runs.train("--max_train_steps=5", trainer_class=trainer_class)
    batch = trainer.encoded(replace(trainer.kept, loss_weights=torch.tensor([0.5, 2.0])))
    noisy = trainer.objective.corrupt(batch.latents, seed=1, step=0, positions=batch.positions)
    plain = trainer.compute_loss(batch, noisy)
    mixed = trainer.compute_loss(replace(batch, custom_attributes=(PRESERVED, {})), noisy)
    with torch.no_grad(), trainer.learner.strength.at(0.0):
        without = trainer.predict(trainer.denoiser, noisy, batch)
    prediction = trainer.predict(trainer.denoiser, noisy, batch)
    assert mixed[1] == plain[1] and mixed[0] != plain[0] and noisy.loss_weights[0] != 1
    expected = (prediction - without)[0].square().mean() * noisy.loss_weights[0] * 0.5
    assert torch.allclose(mixed[0], expected, rtol=1e-5)


def test_a_new_network_has_nothing_to_learn_from_preserved_images(runs):
    attributes = "custom_attributes = { diff_output_preservation = true }"
    runs.write_dataset(runs.images_of(runs.pictures, attributes))
    runs.train("--max_train_steps=2", trainer_class=TableTrainer)
    assert runs.lora()["lora_unet_blocks_0_mlp_layer1.lora_up.weight"].abs().max() == 0


def test_resumed_equals_uninterrupted(runs):
    noise = ("--noise_offset=0.1", "--multires_noise_iterations=3", "--ip_noise_gamma=0.1")
    runs.train("--max_train_steps=4", *noise, output="whole", trainer_class=HuberTrainer)
    runs.train("--max_train_steps=2", "--save_state_on_train_end", *noise, output="part", trainer_class=HuberTrainer)
    resume = f"--resume={runs.folder / 'part' / 't-state'}"
    runs.train("--max_train_steps=4", resume, *noise, output="rest", trainer_class=HuberTrainer)
    assert same_tensors(runs.lora("whole"), runs.lora("rest"))
    assert not same_tensors(runs.lora("whole"), runs.lora("part"))


def test_validation_measures_each_of_its_timesteps(runs):
    trainer = runs.train("--max_train_steps=2", "--validation_split=0.5", trainer_class=TableTrainer)
    assert trainer.objective.validation_timesteps() == (200, 400, 600, 800)
    losses = trainer.validation._losses.measure(1.0, trainer.reporter.passing_bar)
    assert list(losses.by_timestep) == [200, 400, 600, 800]
    assert len(set(losses.by_timestep.values())) == 4 and losses.mean > 0
