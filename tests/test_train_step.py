"""What a training step does with masks, weights, strengths and preserved outputs; the model is the fake architecture."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from PIL import Image

from library.errors import DatasetError, OptionError
from tests.tiny_arch import TinyTrainer
from tests.tiny_runs import TinyRuns, same_tensors

PRESERVED = "custom_attributes = { diff_output_preservation = true }"


@pytest.fixture
def runs(picture_folder, tmp_path) -> TinyRuns:
    return TinyRuns(tmp_path, picture_folder(4))


class LeftOpen(TinyTrainer):
    """Keeps a batch of two images, so that a test can compute with it when the run is over."""

    kept = None

    def backward(self, batch, micro_step, *, parts):
        if len(batch.item_keys) == 2:
            self.kept = batch
        return super().backward(batch, micro_step, parts=parts)

    def losses(self, batch):
        batch = self.encoded(batch)
        noisy = self.objective.corrupt(batch.latents, seed=1, step=0, positions=batch.positions)
        return self.compute_loss(batch, noisy)


@pytest.fixture
def trained(runs) -> LeftOpen:
    """Five steps in, so that the network does something."""
    for picture in runs.pictures.glob("*.png"):
        Image.open(picture).resize((64, 64)).save(picture)
    trainer = runs.train("--max_train_steps=5", trainer_class=LeftOpen)
    assert isinstance(trainer, LeftOpen) and trainer.kept is not None
    return trainer


def gradient(trainer: TinyTrainer, loss: torch.Tensor) -> torch.Tensor:
    weights = [p for p in trainer.network.parameters() if p.requires_grad]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights, retain_graph=True)])


def grid(batch) -> tuple[int, int]:
    return batch.target_wh[1] // 8, batch.target_wh[0] // 8


# ---------------------------------------------------------------- masks


def test_a_mask_of_zeros_takes_an_image_out(trained):
    batch = trained.kept
    mask = torch.ones(2, 1, *grid(batch))
    mask[0] = 0
    losses, plain = trained.losses(replace(batch, mask=mask)), trained.losses(replace(batch, mask=None))
    assert losses[0] == 0 and losses[1] == plain[1] > 0
    assert gradient(trained, losses[0]).abs().max() == 0
    assert torch.equal(gradient(trained, losses[1]), gradient(trained, plain[1]))


def test_the_area_of_a_mask_is_not_divided_out(trained):
    batch = trained.kept
    half = torch.ones(2, 1, *grid(batch))
    half[..., : grid(batch)[1] // 2] = 0
    rest = trained.losses(replace(batch, mask=half)) + trained.losses(replace(batch, mask=1 - half))
    assert torch.allclose(rest, trained.losses(replace(batch, mask=None)), rtol=1e-6)


def test_a_mask_of_another_grid_is_our_own_mistake(trained):
    with pytest.raises(AssertionError):
        trained.losses(replace(trained.kept, mask=torch.ones(2, 1, 1, 1)))


@pytest.mark.parametrize("caches", [(), ("--cache_latents", "--cache_text_encoder_outputs")])
def test_white_masks_train_as_none_and_black_ones_are_refused(runs, caches):
    plain = ("--max_train_steps=3", *caches)
    runs.train(*plain, output="plain")
    for shade, name in ((255, "white"), (0, "black")):
        masks = runs.folder / name
        masks.mkdir()
        for caption in runs.pictures.glob("*.txt"):
            (picture,) = (path for path in runs.pictures.glob(f"{caption.stem}.*") if path != caption)
            Image.new("L", Image.open(picture).size, shade).save(masks / f"{picture.stem}.png")
        runs.write_dataset(runs.images_of(runs.pictures, f'conditioning_data_dir = "{masks.as_posix()}"'))
        refused = pytest.raises(DatasetError, match="4 of 4 masks .* are black everywhere") if shade == 0 else nullcontext()
        with refused:
            runs.train(*plain, "--masked_loss", output=name)
    assert same_tensors(runs.lora("plain"), runs.lora("white"))


# ---------------------------------------------------------------- strength


class Strengths(TinyTrainer):
    """Remembers how strong the network is at each use."""

    def train(self):
        self.seen: list[tuple[str, float]] = []
        super().train()

    def predict(self, denoiser, noisy, batch):
        self.seen.append(("step" if torch.is_grad_enabled() else "validation", self.network.unet_loras[0].multiplier))
        return super().predict(denoiser, noisy, batch)

    def draw_sample(self, *arguments):
        self.seen.append(("sample", self.network.unet_loras[0].multiplier))
        return super().draw_sample(*arguments)


def test_the_strength_of_a_dataset_is_for_its_steps_alone(runs):
    (runs.folder / "prompts.txt").write_text("a cat --w 64 --h 64 --d 3\n")
    runs.write_dataset(dataset="batch_size = 2\nnetwork_multiplier = 0.5")
    trainer = runs.train("--max_train_steps=2", f"--sample_prompts={runs.folder / 'prompts.txt'}", "--sample_every_n_steps=1",
                         "--validation_split=0.25", "--validate_every_n_steps=1", trainer_class=Strengths)  # fmt: skip
    assert isinstance(trainer, Strengths)
    assert set(trainer.seen) == {("step", 0.5), ("sample", 1.0), ("validation", 0.0), ("validation", 1.0)}
    kinds = [kind for kind, _ in trainer.seen]
    assert kinds[:4] == ["validation"] * 4 and {value for kind, value in trainer.seen[:4]} == {0.0}  # the base model, at first


def test_half_the_strength_is_half_the_change(trained):
    batch = replace(trained.kept, network_multiplier=0.5)
    halved = trained.losses(batch)
    for lora in trained.network.unet_loras:
        lora.lora_up.weight.data *= 0.5
    assert torch.allclose(halved, trained.losses(replace(batch, network_multiplier=1.0)), rtol=1e-5)


THIRD_PARTY = ("--network_module=tests.networks.third_party", "--save_model_as=pt", "--max_train_steps=1")


def test_a_network_of_one_strength_is_told_before_anything_is_loaded(runs):
    runs.write_dataset(runs.images_of(runs.pictures, PRESERVED), dataset="network_multiplier = 0.5")
    with pytest.raises(OptionError) as caught:
        runs.train(*THIRD_PARTY, "--dry_run")
    assert "network_multiplier is 0.5, but tests.networks.third_party has one strength only" in str(caught.value)
    assert "4 images such as" in str(caught.value) and "diff_output_preservation" in str(caught.value)


# ---------------------------------------------------------------- preserved outputs


def test_only_preserved_rows_get_the_models_own_prediction_as_target(trained):
    batch = trained.encoded(trained.kept)
    noisy = trained.objective.corrupt(batch.latents, seed=1, step=0, positions=batch.positions)
    plain = trained.compute_loss(batch, noisy)
    mixed = trained.compute_loss(replace(batch, custom_attributes=({"diff_output_preservation": True}, {})), noisy)
    with torch.no_grad(), trained.learner.strength.at(0.0):
        without = trained.predict(trained.denoiser, noisy, batch)
    prediction = trained.predict(trained.denoiser, noisy, batch)
    assert mixed[1] == plain[1]
    assert torch.allclose(mixed[0], ((prediction - without)[0] ** 2).mean(), rtol=1e-6)
    assert mixed[0] != plain[0] and gradient(trained, mixed[0]).abs().max() > 0


def test_nothing_is_predicted_twice_without_such_images(trained, monkeypatch):
    calls: list[int] = []
    predict = TinyTrainer.predict

    def counted(self, denoiser, noisy, text):
        calls.append(len(noisy.latents))
        return predict(self, denoiser, noisy, text)

    monkeypatch.setattr(TinyTrainer, "predict", counted)
    trained.losses(trained.kept)
    assert calls == [2]
    trained.losses(replace(trained.kept, custom_attributes=({}, {"diff_output_preservation": True})))
    assert calls == [2, 2, 2]


@pytest.mark.parametrize("dropout", [(), ("--network_dropout=0.5",)])
def test_a_new_network_has_nothing_to_learn_from_preserved_images(runs, dropout):
    runs.write_dataset(runs.images_of(runs.pictures, PRESERVED))
    runs.train("--max_train_steps=3", *dropout)
    assert runs.lora()["lora_unet_blocks_0_mlp_layer1.lora_up.weight"].abs().max() == 0


def test_dropout_is_off_in_the_targets_of_preserved_images(runs):
    for picture in runs.pictures.glob("*.png"):
        Image.open(picture).resize((64, 64)).save(picture)
    trainer = runs.train("--max_train_steps=5", "--network_dropout=0.5", trainer_class=LeftOpen)
    batch = trainer.encoded(replace(trainer.kept, custom_attributes=({"diff_output_preservation": True}, {})))
    noisy = trainer.objective.corrupt(batch.latents, seed=1, step=0, positions=batch.positions)
    trainer.network.train()
    for lora in trainer.network.unet_loras:
        lora.lora_up.weight.data.fill_(1.0)
    expected = 0.5 * noisy.latents + 0.001 * batch.text.lengths[:, :, None, None]  # TinyDenoiser without a LoRA
    assert not torch.allclose(trainer.predict(trainer.denoiser, noisy, batch), expected)
    targets = trainer.with_preserved_targets(batch, noisy).target
    assert torch.allclose(targets[0], expected[0], atol=1e-6) and torch.equal(targets[1], noisy.target[1])


def test_validation_measures_preserved_images_as_any_others(runs):
    flags = ("--max_train_steps=2", "--validation_split=0.5")
    plain = runs.train(*flags).validation.record.baseline
    runs.write_dataset(runs.images_of(runs.pictures, PRESERVED))
    assert runs.train(*flags).validation.record.baseline == plain > 0


# ---------------------------------------------------------------- weights, and what the plan says of all this


def test_the_weight_of_a_subset_multiplies_its_loss(runs):
    whole = runs.train("--max_train_steps=1").average.mean
    runs.write_dataset(runs.images_of(runs.pictures, "loss_weight = 0.5"))
    assert runs.train("--max_train_steps=1").average.mean == pytest.approx(whole / 2)


def test_the_plan_tells_what_does_not_count_as_plain_images_do(runs, picture_folder, caplog):
    caplog.set_level("INFO")
    held_back = picture_folder(3, name="held_back")
    for path in held_back.iterdir():
        if path.suffix != ".txt":
            Image.open(path).convert("RGB").rotate(180).save(path)  # copies would not be trained
    half = next(runs.pictures.glob("*.png"))
    with Image.open(half) as picture:
        picture.load()
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    picture.save(half)
    runs.write_dataset(
        runs.images_of(runs.pictures, "loss_weight = 0.5", "alpha_mask = true", PRESERVED),
        runs.images_of(held_back, "is_validation = true"),
        dataset="batch_size = 1\nnetwork_multiplier = 0.8",
    )
    runs.train("--max_train_steps=8", "--validate_every_n_steps=3", "--max_validation_steps=2", "--save_best", "--dry_run")
    for text in (
        "; 1 masked",
        "loss weight 0.5: 4 images",
        "0.8 times its strength",
        "4 images stay as the model makes them",
        "validation: 3 images, 2 of 3 batches at 4 timesteps each: the base model once before training, the LoRA after every epoch and every 3 steps, and at the end: 4 times",
        f"kept in {runs.folder / 'out' / 't-best.safetensors'}",
    ):
        assert text in caplog.text, text
