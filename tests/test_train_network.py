"""The trainer itself, driven by a fake architecture in this process."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from library.errors import DatasetError, NetworkError, OptionError, TrainingError
from library.files.safetensors_file import read_header, read_tensors
from library.options.anima import AnimaTrainOptions
from library.options.command_line import read_options
from library.training.files.state import read_description
from library.training.preflight import check_run
from tests.tiny_arch import TinyArchitecture, TinyTrainer
from train_network import run_training


@pytest.fixture
def train(picture_folder, tmp_path):
    """``train("--max_train_steps", 2, ...)`` runs the real ``train()``; the output folder is tmp_path/"out"."""
    folder = picture_folder(5)
    (tmp_path / "set.toml").write_text(
        f"[general]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\n"
        f'bucket_reso_steps = 16\ncaption_extension = ".txt"\n[[datasets]]\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = "{folder.as_posix()}"\n'
    )

    def run(*arguments: object, output: str = "out", trainer_class: type[TinyTrainer] = TinyTrainer) -> TinyTrainer:
        base = ["--pretrained_model_name_or_path=x", "--qwen3=x", "--vae=x", f"--dataset_config={tmp_path / 'set.toml'}"]
        base += [
            f"--output_dir={tmp_path / output}",
            "--output_name=t",
            "--network_module=networks.lora_anima",
            "--network_dim=2",
        ]
        options = read_options(AnimaTrainOptions, [*base, "--learning_rate=1e-2", "--seed=1", *map(str, arguments)])
        trainer = trainer_class(check_run(options, TinyArchitecture()))
        trainer.train()
        return trainer

    return run


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(read_tensors(read_header(path)))


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


CACHED = ("--cache_latents", "--cache_text_encoder_outputs")


@pytest.mark.parametrize("caches", [(), CACHED, ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")])
def test_two_steps_train(train, tmp_path, caches):
    trainer = train("--max_train_steps=2", *caches)
    assert trainer.progress.step == 2
    up = weights(tmp_path / "out" / "t.safetensors")["lora_unet_blocks_0_mlp_layer1.lora_up.weight"]
    assert up.abs().sum() > 0


def test_cold_warm_and_live_give_the_same_weights(train, tmp_path):
    disk = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")
    for output, caches in (("live", ()), ("memory", CACHED), ("cold", disk), ("warm", disk)):
        train("--max_train_steps=4", *caches, output=output)
    for output in ("memory", "cold", "warm"):
        assert same(tmp_path / "live" / "t.safetensors", tmp_path / output / "t.safetensors"), output


@pytest.mark.parametrize(
    "extra", [("--max_data_loader_n_workers=0",), ("--max_data_loader_n_workers=4",), ("--save_every_n_steps=1",)]
)
def test_workers_and_saves_change_nothing(train, tmp_path, extra):
    train("--max_train_steps=5", output="plain")
    train("--max_train_steps=5", *extra, output="other")
    assert same(tmp_path / "plain" / "t.safetensors", tmp_path / "other" / "t.safetensors")


def test_logging_and_sampling_change_nothing(train, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --d 3\n")
    train("--max_train_steps=5", *CACHED, output="plain")
    train("--max_train_steps=5", *CACHED, f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_every_n_steps=2",
          "--sample_at_first", f"--logging_dir={tmp_path / 'logs'}", output="other")  # fmt: skip
    assert same(tmp_path / "plain" / "t.safetensors", tmp_path / "other" / "t.safetensors")
    names = sorted(p.name for p in (tmp_path / "other" / "sample").iterdir())
    assert len(names) == 3 and names[-1].startswith("t_e000000_00_") and names[0].startswith("t_000002_00_")
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))


def test_an_epoch_that_the_run_ends_in_is_drawn_once(train, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --d 3\n")
    train("--max_train_steps=1", f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_every_n_epochs=1")
    (name,) = [path.name for path in (tmp_path / "out" / "sample").iterdir()]
    assert name.startswith("t_e000001_00_")


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit", "Adafactor"])
def test_resumed_equals_uninterrupted(train, tmp_path, optimizer):
    settings = (
        f"--optimizer_type={optimizer}",
        "--network_dropout=0.2",
        "--gradient_accumulation_steps=2",
        "--lr_scheduler=cosine",
    )
    train("--max_train_steps=7", *settings, output="whole")
    train("--max_train_steps=7", "--save_every_n_steps=3", "--save_state", *settings, output="parts")
    (tmp_path / "parts" / "t.safetensors").unlink()
    train("--max_train_steps=7", *settings, f"--resume={tmp_path / 'parts' / 't-step00000003-state'}", output="parts")
    assert same(tmp_path / "whole" / "t.safetensors", tmp_path / "parts" / "t.safetensors")


def test_resume_latest_begins_anew_where_there_is_no_state_and_goes_on_where_there_is(train, tmp_path):
    train("--max_train_steps=3", "--resume=latest", "--save_state_on_train_end")
    trainer = train("--max_train_steps=5", "--resume=latest")
    assert trainer.run.start.step == 3 and trainer.progress.step == 5


def test_another_seed_is_another_run(train, tmp_path):
    for output, seed in (("one", 5), ("again", 5), ("other", 6)):
        train("--max_train_steps=2", f"--seed={seed}", output=output)
    one, again, other = (tmp_path / output / "t.safetensors" for output in ("one", "again", "other"))
    assert same(one, again) and not same(one, other)


class CountingBatches(TinyTrainer):
    """Remembers the micro-batches of each step."""

    def train(self):
        self.counted: list[int] = []
        super().train()

    def backward(self, batch, micro_step, *, parts):
        self.counted.append(micro_step)
        return super().backward(batch, micro_step, parts=parts)


def test_accumulated_batches_make_one_step(train):
    trainer = train("--max_train_epochs=1", "--gradient_accumulation_steps=2", trainer_class=CountingBatches)
    assert trainer.counted == [0, 1, 2] and trainer.progress.step == 2  # of three batches


def test_gradients_are_cut_at_their_norm(train, tmp_path):
    """SGD moves a weight by its gradient: by all weights together at most rate x norm in a step."""
    sgd = ("--max_train_steps=1", "--optimizer_type=torch.optim.SGD", "--learning_rate=1")
    for output, norm in (("cut", 0.125), ("whole", 0)):
        train(*sgd, f"--max_grad_norm={norm}", output=output)
    ups = [
        torch.cat([w.flatten() for key, w in weights(tmp_path / output / "t.safetensors").items() if "lora_up" in key])
        for output in ("cut", "whole")
    ]
    assert ups[0].norm() == pytest.approx(0.125, rel=1e-3) and ups[1].norm() > 0.126
    assert torch.allclose(ups[0] / ups[0].norm(), ups[1] / ups[1].norm(), atol=1e-5)


def test_the_seed_of_a_state_is_kept(train, tmp_path):
    train("--max_train_steps=2", "--save_state_on_train_end", "--seed=77")
    description = json.loads((tmp_path / "out" / "t-state" / "train_state.json").read_text())
    assert description["seed"] == 77


def test_other_settings_than_the_states_are_refused(train, tmp_path):
    train("--max_train_steps=2", "--save_state_on_train_end")
    with pytest.raises(OptionError, match="--network_dim 2, but this run has 4"):
        train("--max_train_steps=4", "--resume=latest", "--network_dim=4")


def test_files_and_states_are_kept_and_removed_as_asked(train, tmp_path):
    train("--max_train_epochs=4", "--save_every_n_epochs=1", "--save_last_n_epochs=2", "--save_state")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [
        "t-000002-state",
        "t-000002.safetensors",
        "t-000003-state",
        "t-000003.safetensors",
        "t-state",
        "t.safetensors",
    ]


def test_initial_step_skips_the_data_before_it(train, tmp_path):
    trainer = train("--max_train_steps=6", "--initial_step=4", "--skip_until_initial_step")
    assert trainer.progress.step == 6 and trainer.progress.position == 6


def test_a_diverging_run_stops_with_good_weights(train, tmp_path):
    with pytest.raises(TrainingError, match="--learning_rate"):
        train("--max_train_steps=40", "--learning_rate=1e30", "--max_grad_norm=0")
    assert all(torch.isfinite(t).all() for t in weights(tmp_path / "out" / "t.safetensors").values())


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize(("table", "line"), [("[[datasets]]", "network_multiplier"), ("[[datasets.subsets]]", "loss_weight")])
def test_a_run_in_which_no_step_was_finite_is_not_done(train, tmp_path, steps, table, line):
    file = tmp_path / "set.toml"
    file.write_text(file.read_text().replace(f"{table}\n", f"{table}\n{line} = 1e30\n"))
    with pytest.raises(TrainingError, match=r"nothing was trained and no LoRA is saved: in none of \d steps .*loss_weight"):
        train(f"--max_train_steps={steps}")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_run_that_ends_in_skipped_steps_is_not_done(train, tmp_path):
    class Spoiled(TinyTrainer):
        def compute_loss(self, batch, noisy):
            return super().compute_loss(batch, noisy) * (1.0 if self.progress.step < 3 else float("nan"))

    with pytest.raises(TrainingError, match="not finite, last at step 8; the last good weights are in .*: try a lower"):
        train("--max_train_steps=8", trainer_class=Spoiled)
    trainer = train("--max_train_steps=7", trainer_class=Spoiled, output="fewer")  # four: not told from bad luck
    assert trainer.guard.skipped == 4 and (tmp_path / "fewer" / "t.safetensors").exists()


def test_max_norm_is_kept(train, tmp_path):
    train("--max_train_steps=8", "--learning_rate=1", "--scale_weight_norms=0.5")
    w = weights(tmp_path / "out" / "t.safetensors")
    name = "lora_unet_blocks_0_mlp_layer1"
    delta = w[f"{name}.lora_up.weight"] @ w[f"{name}.lora_down.weight"] * w[f"{name}.alpha"] / 2
    assert delta.norm() <= 0.5 + 1e-5


def test_network_weights_are_the_start(train, tmp_path):
    train("--max_train_steps=3", output="first")
    train("--max_train_steps=1", "--learning_rate=0", f"--network_weights={tmp_path / 'first' / 't.safetensors'}", "--unet_lr=1e-30",
          output="second")  # fmt: skip
    assert same(tmp_path / "first" / "t.safetensors", tmp_path / "second" / "t.safetensors")


def test_metadata_tells_what_was_trained(train, tmp_path):
    train("--max_train_epochs=2", "--metadata_author=Me", "--training_comment=hello")
    metadata = read_header(tmp_path / "out" / "t.safetensors").metadata
    assert metadata["ss_epoch"] == "2" and metadata["ss_network_dim"] == "2" and metadata["modelspec.author"] == "Me"
    assert json.loads(metadata["ss_datasets"])[0]["num_train_images"] == 5
    assert sum(json.loads(metadata["ss_tag_frequency"])["pictures"].values()) > 0
    assert str(tmp_path) not in json.dumps(metadata)


def test_dry_run_trains_and_writes_nothing(train, tmp_path, caplog):
    caplog.set_level("INFO")
    train("--max_train_steps=2", "--dry_run", "--cache_latents_to_disk")
    assert not any((tmp_path / "out").iterdir())
    assert "5 images" in caplog.text


def test_base_weights_are_merged_with_their_multiplier(train, tmp_path):
    train("--max_train_steps=3", output="first")
    file = tmp_path / "first" / "t.safetensors"
    trainer = train(
        "--max_train_steps=1", "--base_weights", str(file), str(file), "--base_weights_multiplier", "0.5", output="second"
    )
    w, name = weights(file), "lora_unet_blocks_0_mlp_layer1"
    delta = w[f"{name}.lora_up.weight"] @ w[f"{name}.lora_down.weight"] * w[f"{name}.alpha"] / 2
    expected = torch.eye(3) * 0.5 + 1.5 * delta  # 0.5 as given, 1.0 where no multiplier is left
    assert torch.allclose(trainer.denoiser.blocks[0].mlp["layer1"].weight, expected, atol=1e-6)


def test_ranks_come_from_the_weights(train, tmp_path):
    train("--max_train_steps=1", "--network_dim=3", output="first")
    train(
        "--max_train_steps=1", f"--network_weights={tmp_path / 'first' / 't.safetensors'}", "--dim_from_weights", output="second"
    )
    assert weights(tmp_path / "second" / "t.safetensors")["lora_unet_blocks_0_mlp_layer1.lora_down.weight"].shape[0] == 3


@pytest.mark.parametrize(
    ("container", "precision", "dtype"), [("ckpt", None, torch.float32), ("safetensors", "bf16", torch.bfloat16)]
)
def test_container_and_precision_of_the_file(train, tmp_path, container, precision, dtype):
    flags = [f"--save_model_as={container}"] + ([f"--save_precision={precision}"] if precision else [])
    train("--max_train_steps=1", *flags)
    file = tmp_path / "out" / f"t.{container}"
    saved = weights(file) if container == "safetensors" else torch.load(file, weights_only=True)
    assert {tensor.dtype for tensor in saved.values()} == {dtype}


def test_minimum_metadata(train, tmp_path):
    train("--max_train_steps=1", "--no_metadata", "--metadata_title=T")
    metadata = read_header(tmp_path / "out" / "t.safetensors").metadata
    ours = {key for key in metadata if key.startswith("ss_")}
    assert ours == {"ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha"}
    assert metadata["modelspec.title"] == "T" and "sshs_model_hash" in metadata


def test_logged_rates_are_those_of_their_step(train, tmp_path):
    train("--max_train_steps=4", "--lr_scheduler=linear", f"--logging_dir={tmp_path / 'logs'}")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = next((tmp_path / "logs").rglob("events.out.tfevents*")).parent
    events = EventAccumulator(str(folder))
    events.Reload()
    rates = {event.step: event.value for event in events.Scalars("lr/unet")}
    assert rates == pytest.approx({1: 1e-2, 2: 7.5e-3, 3: 5e-3, 4: 2.5e-3})
    names = set(events.Tags()["scalars"])
    assert {"loss/current", "loss/average", "norm/grad", "speed/images_per_s", "speed/data_wait_s", "memory/peak_gib"} <= names


def test_every_step_has_its_speed(train, tmp_path):
    """Also the last of an epoch and those before a state, whose numbers are fetched at once."""

    class Slow(TinyTrainer):
        def next_batch(self, epoch, number):
            time.sleep(0.05)
            return super().next_batch(epoch, number)

        def validate(self):
            self.report_pending()
            time.sleep(0.2)  # counts for no step

    train(
        "--max_train_steps=7", "--save_every_n_steps=2", "--save_state", f"--logging_dir={tmp_path / 'logs'}", trainer_class=Slow
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events.out.tfevents*")).parent))
    events.Reload()
    speeds = {event.step: event.value for event in events.Scalars("speed/images_per_s")}
    assert sorted(speeds) == list(range(1, 8)) and all(1 / 0.2 < speed <= 2 / 0.05 for speed in speeds.values())
    assert all(event.value >= 0 for event in events.Scalars("speed/data_wait_s"))


def test_a_picture_that_goes_bad_in_mid_training_costs_no_step(train, tmp_path, picture_folder):
    picture = sorted(p for p in (tmp_path / "pictures").iterdir() if p.suffix == ".png")[0]

    class Spoiled(TinyTrainer):
        def run_due_events(self):
            super().run_due_events()
            if self.progress.step == 4:
                picture.write_bytes(b"not a picture any more")

    with pytest.raises(DatasetError, match=picture.name):
        train("--max_train_steps=40", "--max_data_loader_n_workers=0", trainer_class=Spoiled)
    states = [path for path in (tmp_path / "out").iterdir() if path.name.endswith("-state")]
    assert len(states) == 1 and read_description(states[0]).progress.step >= 4
    assert states[0].with_name(states[0].name.replace("-state", ".safetensors")).exists()


def test_a_failure_before_the_first_step_saves_nothing(train, tmp_path):
    class Spoiled(TinyTrainer):
        def before_training(self):
            raise DatasetError("bad.png")

    with pytest.raises(DatasetError, match="bad"):
        train("--max_train_steps=2", trainer_class=Spoiled)
    assert not list((tmp_path / "out").iterdir())
    train("--max_train_steps=2", "--save_state_on_train_end")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    with pytest.raises(DatasetError, match="bad"):
        train("--max_train_steps=4", "--resume=latest", trainer_class=Spoiled)
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_pictures_are_no_part_of_a_steps_time(train, tmp_path):
    class Watched(TinyTrainer):
        def draw_sample(self, *arguments):
            assert self.numbers.take() is None  # the step's numbers have come, and its end was noted
            return super().draw_sample(*arguments)

    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64\n")
    train(
        "--max_train_steps=2", f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_every_n_steps=1", trainer_class=Watched
    )


def test_weights_that_are_not_finite_are_never_saved(train, tmp_path):
    class Poisoned(TinyTrainer):
        def step_optimizer(self, loss, facts):
            numbers = super().step_optimizer(loss, facts)
            if self.progress.step == 2:  # as an optimizer in fp16 whose epsilon is 0 can do
                self.network.unet_loras[0].lora_up.weight.data.fill_(float("nan"))
            return numbers

    with pytest.raises(TrainingError, match="last good weights"):
        train("--max_train_steps=3", trainer_class=Poisoned)
    assert all(torch.isfinite(t).all() for t in weights(tmp_path / "out" / "t.safetensors").values())


def test_weights_that_were_never_finite_are_told_and_not_saved(train, tmp_path):
    class Poisoned(TinyTrainer):
        def load_models(self):
            super().load_models()
            for parameter in self.network.parameters():
                parameter.data.fill_(float("nan"))

    with pytest.raises(TrainingError, match="not finite from the start"):
        train("--max_train_steps=20", trainer_class=Poisoned, output="second")
    assert not list((tmp_path / "second").glob("*.safetensors"))


def test_a_network_file_of_another_rank_is_told_by_a_dry_run(train, tmp_path):
    train("--max_train_steps=1", "--network_dim=3", output="first")
    with pytest.raises(NetworkError, match="--dim_from_weights"):
        train("--max_train_steps=1", f"--network_weights={tmp_path / 'first' / 't.safetensors'}", "--dry_run", output="second")


THIRD_PARTY = ("--network_module=tests.networks.third_party", "--save_model_as=pt")


def test_a_third_party_network_with_only_the_required_calls(train, tmp_path):
    train("--max_train_steps=6", *THIRD_PARTY, "--gradient_checkpointing", output="whole")
    train("--max_train_steps=3", *THIRD_PARTY, "--save_state_on_train_end", output="parts")
    train("--max_train_steps=6", *THIRD_PARTY, "--resume=latest", output="parts")
    whole, parts = (torch.load(tmp_path / name / "t.pt", weights_only=True)["shift"] for name in ("whole", "parts"))
    assert whole != 0 and torch.equal(whole, parts)


def test_a_network_that_cannot_scale_norms_is_told(train):
    with pytest.raises(OptionError, match="--scale_weight_norms"):
        train("--max_train_steps=1", *THIRD_PARTY, "--scale_weight_norms=1")


class FullGpu(TinyTrainer):
    def predict(self, denoiser, noisy, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total ...")


def test_a_full_gpu_is_told_with_what_would_help(train, capsys, monkeypatch):
    trained = []
    monkeypatch.setattr(FullGpu, "train", lambda self: trained.append(self) or FullGpu.predict(self, None, None, None))
    run = train("--max_train_steps=1", "--gradient_checkpointing", "--dry_run").run
    with pytest.raises(SystemExit) as ended:
        run_training(FullGpu, run)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and trained
    assert "Tried to allocate 2.00 GiB" in told and "--fp8_base_unet" in told and "--gradient_checkpointing" not in told


class FullAtTheThird(TinyTrainer):
    def predict(self, denoiser, noisy, batch):
        if self.progress.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().predict(denoiser, noisy, batch)


def test_the_steps_before_the_gpu_was_full_are_saved_and_gone_on_from(train, tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        train("--max_train_steps=5", trainer_class=FullAtTheThird)
    state = tmp_path / "out" / "t-step00000002-state"
    train("--max_train_steps=5", f"--resume={state}")
    train("--max_train_steps=5", output="whole")
    assert same(tmp_path / "out" / "t.safetensors", tmp_path / "whole" / "t.safetensors")


def test_weights_that_are_changed_in_part_are_not_saved(train, tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        train("--max_train_steps=5", "--fused_backward_pass", "--max_grad_norm=0", trainer_class=FullAtTheThird)
    assert not list((tmp_path / "out").glob("*-state"))
