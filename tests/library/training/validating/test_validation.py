"""Validation in runs of the fake architecture: what is measured, when, what is kept, and that it changes nothing."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.dataset.caches.latent_cache import LatentRecipe
from library.errors import OptionError
from library.randomness import torch_generator
from library.training.files.state import read_description
from library.training.steps import Progress
from library.training.validating import validation
from library.training.validating.validation import FixedLosses
from library.training.validating.validation_plan import noise_seed
from tests.tiny_arch import TinyArchitecture, TinyTrainer
from tests.tiny_runs import TinyRuns, same_tensors

REPOSITORY = Path(__file__).parents[4]
SPLIT = "--validation_split=0.4"
BY_STEPS = ("--validate_every_n_steps=1", "--validate_every_n_epochs=1000")
CURVE = "loss/validation/step_average"


class Watched(TinyTrainer):
    """Remembers every curve that validation logs."""

    def start_validation(self):
        super().start_validation()
        self.curves: dict[str, dict[int, float]] = {}
        self.validation._log = self.log

    def log(self, values, step):
        for name, value in values.items():
            self.curves.setdefault(name, {})[step] = value


@pytest.fixture
def runs(picture_folder, tmp_path) -> TinyRuns:
    return TinyRuns(tmp_path, picture_folder(7))


def watched(runs: TinyRuns, *arguments: object, output: str = "out", trainer_class: type[Watched] = Watched) -> Watched:
    trainer = runs.train(*arguments, output=output, trainer_class=trainer_class)
    assert isinstance(trainer, Watched)
    return trainer


@pytest.fixture
def measured(monkeypatch) -> list[float]:
    """The strength of the network at each measurement."""
    strengths: list[float] = []
    measure = FixedLosses.measure

    def counted(self, strength, bar):
        strengths.append(strength)
        return measure(self, strength, bar)

    monkeypatch.setattr(FixedLosses, "measure", counted)
    return strengths


# ---------------------------------------------------------------- what is measured


def test_the_base_models_loss_is_that_of_fixed_noise_at_four_timesteps(runs):
    trainer = watched(runs, SPLIT, "--max_train_steps=1")
    losses = trainer.validation._losses
    by_image: list[float] = []
    for number in range(len(losses.batches)):
        batch = trainer.encoded(losses.batches.batch(number))
        for row, key in enumerate(batch.item_keys):
            latents = batch.latents[row : row + 1]
            noise = torch.randn(latents.shape[1:], generator=torch_generator("validation noise", 1, key))[None]
            for sigma in (0.2, 0.4, 0.6, 0.8):
                noisy = sigma * noise + (1 - sigma) * latents
                prediction = 0.5 * noisy + 0.001 * len(batch.captions[row])  # TinyDenoiser without a LoRA
                by_image.append(float(((prediction - (noise - latents)) ** 2).mean()))
    assert len(by_image) == 4 * len(trainer.run.training_set.validation) > 4
    assert trainer.validation.record.baseline == pytest.approx(sum(by_image) / len(by_image), rel=1e-6)


def test_the_curves_and_their_names(runs):
    trainer = watched(runs, SPLIT, "--max_train_steps=5", "--validate_every_n_steps=2")
    epoch = trainer.run.length.steps_per_epoch
    assert epoch in (2, 3)
    curves = trainer.curves
    assert curves.keys() == {
        f"loss/validation/{name}"
        for name in ("baseline", "step_average", "step_divergence", "epoch_average", "epoch_divergence", "timestep_200",
                     "timestep_400", "timestep_600", "timestep_800")
    }  # fmt: skip
    assert sorted(curves[CURVE]) == [2, 4]
    assert sorted(curves["loss/validation/epoch_average"]) == [step for step in range(1, 6) if step % epoch == 0 or step == 5]
    assert len(set(curves["loss/validation/baseline"].values())) == 1 and 0 in curves["loss/validation/baseline"]
    steps = [curves[f"loss/validation/timestep_{t}"][4] for t in (200, 400, 600, 800)]
    assert curves[CURVE][4] == pytest.approx(sum(steps) / 4)
    assert curves[CURVE][4] < curves["loss/validation/baseline"][0]  # five pictures of one kind: it learns


def test_divergence_is_from_the_training_average_that_knows_this_step(runs):
    trainer = watched(runs, SPLIT, *BY_STEPS, "--max_train_steps=1")
    assert trainer.curves["loss/validation/step_divergence"][1] == pytest.approx(trainer.curves[CURVE][1] - trainer.average.mean)


@pytest.mark.parametrize(
    "other", [("--cache_latents", "--cache_text_encoder_outputs"), ("--max_data_loader_n_workers=0",), ("--max_train_steps=2",)]
)
def test_the_measure_does_not_depend_on_how_it_is_made(runs, other):
    base = runs.train(SPLIT, "--max_train_steps=1").validation.record.baseline
    assert runs.train(SPLIT, "--max_train_steps=1", *other).validation.record.baseline == pytest.approx(base, rel=1e-6)


def test_the_measure_does_not_depend_on_the_batch_size(runs):
    base = runs.train(SPLIT, "--max_train_steps=1").validation.record.baseline
    runs.write_dataset(dataset="batch_size = 1")
    assert runs.train(SPLIT, "--max_train_steps=1").validation.record.baseline == pytest.approx(base, rel=1e-6)


def test_a_part_of_the_batches(runs):
    runs.write_dataset(dataset="batch_size = 1")
    trainer = runs.train(SPLIT, "--max_train_steps=1", "--max_validation_steps=1")
    assert len(trainer.validation._losses.batches) == 1 < len(trainer.run.training_set.validation)
    assert trainer.validation.record.baseline is not None


def test_the_seed_of_the_noise_is_never_a_random_one(runs):
    options = runs.checked("--max_train_steps=1").options
    assert noise_seed(options) == 1
    assert noise_seed(runs.checked("--max_train_steps=1", "--validation_seed=5").options) == 5


def test_images_of_all_datasets_count_alike_at_full_strength(runs):
    base = runs.train(SPLIT, *BY_STEPS, "--max_train_steps=1").validation.record
    runs.write_dataset(runs.images_of(runs.pictures, "loss_weight = 3"), dataset="batch_size = 2\nnetwork_multiplier = 0.5")
    other = runs.train(SPLIT, *BY_STEPS, "--max_train_steps=1").validation.record
    assert other.baseline == base.baseline


# ---------------------------------------------------------------- it changes nothing


class Unwatched(TinyTrainer):
    def before_training(self):
        assert self.progress.step == 0

    def validate(self):
        assert self.validation.record.baseline is None


@pytest.mark.parametrize("extra", [(), ("--optimizer_type=AdamWScheduleFree",)])
def test_training_is_the_same_with_and_without_validation(runs, extra):
    flags = (SPLIT, "--max_train_steps=5", "--network_dropout=0.3", "--gradient_accumulation_steps=2", *extra)
    if extra:
        pytest.importorskip("schedulefree")
    trainer = watched(runs, *flags, *BY_STEPS, output="with")
    assert len(trainer.curves[CURVE]) == 5
    runs.train(*flags, output="without", trainer_class=Unwatched)
    assert same_tensors(runs.lora("with"), runs.lora("without"))


def test_without_validation_images_nothing_is_measured(runs, measured):
    trainer = runs.train("--max_train_steps=3")
    assert measured == [] and trainer.validation.record.baseline is None


# ---------------------------------------------------------------- resuming


def test_the_base_model_is_measured_once_in_a_run(runs, measured):
    flags = (SPLIT, *BY_STEPS)
    runs.train(*flags, "--max_train_steps=2", "--save_state_on_train_end")
    trainer = watched(runs, *flags, "--max_train_steps=4", "--resume=latest")
    assert measured == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert sorted(trainer.curves[CURVE]) == sorted(trainer.curves["loss/validation/baseline"]) == [3, 4]


def test_a_resumed_run_has_the_curve_of_an_uninterrupted_one(runs):
    flags = (SPLIT, *BY_STEPS, "--max_train_steps=6")
    whole = watched(runs, *flags, output="whole")
    watched(runs, *flags, "--save_every_n_steps=3", "--save_state", output="parts")
    state = f"--resume={runs.folder / 'parts' / 't-step00000003-state'}"
    rest = watched(runs, *flags, state, output="parts")
    assert same_tensors(runs.lora("whole"), runs.lora("parts"))
    for name, curve in rest.curves.items():
        assert curve == {step: value for step, value in whole.curves[name].items() if step > 3}, name
    assert rest.validation.record == whole.validation.record


class Stopped(Watched):
    """A signal comes in the middle of the validation after step 2."""

    def compute_loss(self, batch, noisy):
        if not torch.is_grad_enabled() and self.progress.step == 2:
            self.stop.signal_number = int(signal.SIGTERM)
        return super().compute_loss(batch, noisy)


def test_a_validation_that_was_given_up_is_made_after_the_resume(runs, caplog):
    caplog.set_level("INFO")
    flags = (SPLIT, *BY_STEPS, "--max_train_steps=4", "--save_best")
    whole = watched(runs, *flags, output="whole")
    with pytest.raises(SystemExit) as stopped:
        runs.train(*flags, output="parts", trainer_class=Stopped)
    assert stopped.value.code == 143 and "after step 2 was given up" in caplog.text
    state = json.loads((runs.folder / "parts" / "t-step00000002-state" / "train_state.json").read_text())
    assert state["current_step"] == 2 and state["validation"]["finished_step"] == 1
    rest = watched(runs, *flags, "--resume=latest", output="parts")
    assert same_tensors(runs.lora("whole"), runs.lora("parts"))
    assert rest.curves[CURVE] == {step: value for step, value in whole.curves[CURVE].items() if step >= 2}
    assert same_tensors(runs.lora("whole", "t-best"), runs.lora("parts", "t-best"))


class StoppedAtTheEnd(Watched):
    def compute_loss(self, batch, noisy):
        if not torch.is_grad_enabled() and self.progress.step == 2:
            self.stop.signal_number = int(signal.SIGTERM)
            assert self.run.names.last_file().exists()  # should the job be killed now
        return super().compute_loss(batch, noisy)


def test_a_signal_during_the_last_validation_waits_for_it(runs):
    """Nothing is left to go on with: a run that gave it up would never know whether its last LoRA is the best."""
    flags = (SPLIT, "--max_train_steps=2", "--validate_every_n_epochs=1000", "--save_best")
    trainer = watched(runs, *flags, trainer_class=StoppedAtTheEnd)
    assert trainer.validation.record.best_step == 2 and same_tensors(runs.lora(), runs.lora(name="t-best"))


class StoppedAtOnce(Watched):
    def before_training(self):
        self.stop.signal_number = int(signal.SIGINT)
        super().before_training()


def test_a_signal_while_the_base_model_is_measured(runs):
    flags = (SPLIT, *BY_STEPS, "--max_train_steps=2")
    with pytest.raises(SystemExit) as stopped:
        runs.train(*flags, trainer_class=StoppedAtOnce)
    assert stopped.value.code == 130
    trainer = watched(runs, *flags, "--resume=latest")
    assert trainer.run.resumed is not None and trainer.validation.record.baseline is not None
    assert sorted(trainer.curves[CURVE]) == [1, 2]


def test_another_split_is_refused_on_resume(runs):
    runs.train(SPLIT, "--max_train_steps=2", "--save_state_on_train_end")
    for other in ((), ("--validation_split=0.6",), (SPLIT, "--validation_seed=9")):
        with pytest.raises(OptionError, match=r"the validation split 0\.4 of dataset 1 by seed 1, but this run has"):
            runs.train(*other, "--max_train_steps=4", "--resume=latest")


def test_a_best_loss_of_something_else_does_not_count(runs, caplog):
    flags = (SPLIT, *BY_STEPS, "--save_state_on_train_end")
    runs.train(*flags, "--max_train_steps=2")
    trainer = watched(runs, *flags, "--max_train_steps=3", "--resume=latest", "--loss_type=l1")
    assert "does not count: other --loss_type" in caplog.text
    assert trainer.validation.record.best == trainer.curves[CURVE][3]
    assert sorted(trainer.curves["loss/validation/baseline"]) == [2, 3]


@pytest.mark.parametrize(
    ("dataset", "flags"),
    [
        ("batch_size = 1", ()),
        ("batch_size = 2", ("--cache_latents", "--max_validation_steps=100", "--seed=5", "--validation_seed=1")),
    ],
)
def test_how_it_is_measured_may_change_on_resume(runs, caplog, dataset, flags):
    plain = (SPLIT, *BY_STEPS)
    runs.train(*plain, "--validation_seed=1", "--max_train_steps=2", "--save_state_on_train_end")
    runs.write_dataset(dataset=dataset)
    run = runs.checked(*plain, "--validation_seed=1", "--max_train_steps=9", "--resume=latest", *flags)
    trainer = Opened(run)
    trainer.train()
    assert "does not count" not in caplog.text
    assert trainer.validation.record == run.resumed.validation and trainer.validation.record.best is not None


class Opened(TinyTrainer):
    """Ends before anything is measured."""

    def before_training(self):
        self.progress = Progress(self.run.length.total_steps, 0)

    def finish(self):
        self.batches.close()


@pytest.mark.parametrize("changed", ["caption", "vae", "base model"])
def test_what_is_measured_must_not_change_on_resume(runs, caplog, monkeypatch, changed):
    flags = (SPLIT, *BY_STEPS)
    runs.train(*flags, "--max_train_steps=2", "--save_state_on_train_end")
    if changed == "caption":
        for caption in runs.pictures.glob("*.txt"):
            caption.write_text("something else")
    elif changed == "vae":
        other = LatentRecipe(arch="tiny", vae_fingerprint="1", dtype="float32", channels=3)
        monkeypatch.setattr(TinyArchitecture, "latent_recipe", lambda *_: other)
    else:
        monkeypatch.setattr(validation, "base_model_fingerprint", lambda _: "another")
    trainer = Opened(runs.checked(*flags, "--max_train_steps=9", "--resume=latest"))
    trainer.train()
    assert "does not count: " in caplog.text and trainer.validation.record.best is None


def test_a_part_of_the_batches_is_known_by_its_images(runs):
    runs.write_dataset(dataset="batch_size = 1")

    def measured(*flags: str) -> str:
        trainer = Opened(runs.checked("--validation_split=0.6", "--max_train_steps=2", *flags))
        trainer.train()
        return trainer.validation.record.measured

    whole = measured()
    assert measured("--max_validation_steps=100") == whole != measured("--max_validation_steps=2")


def test_another_step_than_the_states_owes_no_validation(runs):
    flags = (SPLIT, *BY_STEPS)
    runs.train(*flags, "--max_train_steps=3", "--save_state_on_train_end")
    at_once = watched(runs, *flags, "--max_train_steps=6", "--resume=latest", "--initial_step=4")
    assert sorted(at_once.curves[CURVE]) == [5, 6]
    again = watched(runs, *flags, "--max_train_steps=4", "--resume=latest", "--initial_step=2")
    assert sorted(again.curves[CURVE]) == [3, 4]


# ---------------------------------------------------------------- the best


def test_the_best_lora_is_kept_with_its_loss(runs):
    flags = (SPLIT, *BY_STEPS, "--max_train_steps=8", "--learning_rate=0.5", "--save_every_n_steps=1", "--save_best")
    trainer = watched(runs, *flags)
    curve = trainer.curves[CURVE]
    best = min(curve, key=lambda step: curve[step])
    assert 1 <= best < 8  # the rate is far too high
    assert same_tensors(runs.lora(name="t-best"), runs.lora(name=f"t-step{best:08d}"))
    metadata = runs.metadata(name="t-best")
    assert metadata["ss_steps"] == str(best) and float(metadata["ss_validation_loss"]) == curve[best]
    assert float(metadata["ss_validation_baseline"]) == trainer.validation.record.baseline
    assert "ss_validation_loss" not in runs.metadata()


def test_a_resumed_run_does_not_replace_a_better_file(runs):
    flags = (SPLIT, *BY_STEPS, "--save_best", "--save_state_on_train_end")
    runs.train(*flags, "--max_train_steps=2")
    description = runs.folder / "out" / "t-state" / "train_state.json"
    state = json.loads(description.read_text())
    state["validation"] |= {"best": 1e-6, "best_step": 1}
    description.write_text(json.dumps(state))
    before = runs.metadata(name="t-best")
    runs.train(*flags, "--max_train_steps=4", "--resume=latest")
    assert runs.metadata(name="t-best") == before


SAVED = (*BY_STEPS, "--save_best", "--save_state_on_train_end")


def test_the_best_of_other_images_is_kept_under_another_name(runs, picture_folder, caplog):
    caplog.set_level("INFO")
    held_back, more = picture_folder(3, name="held_back"), picture_folder(5, name="more")
    runs.write_dataset(runs.images_of(runs.pictures), runs.images_of(held_back, "is_validation = true"))
    first = watched(runs, *SAVED, "--max_train_steps=2")
    step, before = first.validation.record.best_step, runs.lora(name="t-best")
    runs.write_dataset(runs.images_of(runs.pictures), runs.images_of(more, "is_validation = true"))
    second = watched(runs, *SAVED, "--max_train_steps=4", "--resume=latest")
    assert same_tensors(runs.lora(name=f"t-best-step{step:08d}"), before)
    assert runs.metadata(name="t-best")["ss_steps"] == str(second.validation.record.best_step)
    assert second.validation.record.displaced_step is None
    assert "does not count: 2 of 5 validation images are new" in caplog.text
    assert f"t-best.safetensors of step {step} is renamed to t-best-step{step:08d}.safetensors" in caplog.text
    assert f"kept t-best.safetensors as {runs.folder / 'out'}" in caplog.text


class NeverBetter(Watched):
    def compute_loss(self, batch, noisy):
        losses = super().compute_loss(batch, noisy)
        return losses if torch.is_grad_enabled() else losses * float("nan")


def test_the_old_best_waits_for_a_new_one_through_several_runs(runs, caplog):
    first = watched(runs, SPLIT, *SAVED, "--max_train_steps=2")
    step = first.validation.record.best_step
    flags = (SPLIT, *SAVED, "--loss_type=l1", "--resume=latest")
    second = watched(runs, *flags, "--max_train_steps=3", trainer_class=NeverBetter)
    assert second.validation.record.displaced_step == step and second.validation.record.best is None
    watched(runs, *flags, "--max_train_steps=4")
    assert runs.metadata(name=f"t-best-step{step:08d}")["ss_steps"] == str(step)
    third = runs.metadata(name="t-best")
    watched(runs, *flags, "--max_train_steps=5")  # nothing has changed: an ordinary best
    assert third["ss_steps"] == "4" and len(list((runs.folder / "out").glob("t-best-*"))) == 1


def test_images_that_validated_and_are_trained_now_are_told(runs, picture_folder):
    held_back = picture_folder(3, name="held_back")
    own = runs.images_of(runs.pictures)
    runs.write_dataset(own, runs.images_of(held_back, "is_validation = true"))
    runs.train("--max_train_steps=2", "--save_state_on_train_end")
    same = runs.checked("--max_train_steps=3", "--resume=latest")
    assert not [warning for warning in same.warnings if "images that validated" in warning]
    runs.write_dataset(own, runs.images_of(held_back))
    checked = runs.checked("--max_train_steps=3", "--resume=latest")
    (told,) = [warning for warning in checked.warnings if "images that validated" in warning]
    assert "3 of the 3 images that validated when the state was saved are trained now (such as " in told


def test_a_best_that_no_file_holds_is_none(runs, caplog):
    caplog.set_level("INFO")
    flags = (SPLIT, *BY_STEPS)
    runs.train(*flags, "--max_train_steps=4", "--save_every_n_steps=3", "--save_state")
    state = runs.folder / "out" / "t-step00000003-state"
    description = json.loads((state / "train_state.json").read_text())
    description["validation"] |= {"best": 1e-6, "best_step": 1}
    (state / "train_state.json").write_text(json.dumps(description))
    trainer = watched(runs, *flags, "--max_train_steps=4", f"--resume={state}", "--save_best")
    assert "there is no" in caplog.text and "t-best.safetensors, so the best loss is looked for from here on" in caplog.text
    metadata = runs.metadata(name="t-best")
    assert metadata["ss_steps"] == "4" and float(metadata["ss_validation_loss"]) == trainer.curves[CURVE][4]
    assert trainer.validation.record.best_step == 4


class NotFinite(Watched):
    def compute_loss(self, batch, noisy):
        losses = super().compute_loss(batch, noisy)
        return losses if torch.is_grad_enabled() or self.progress.step != 1 else losses * float("nan")


def test_a_loss_that_is_not_finite_is_told_and_never_the_best(runs, caplog):
    trainer = watched(runs, SPLIT, *BY_STEPS, "--max_train_steps=2", "--save_best", trainer_class=NotFinite)
    assert "validation after step 1: the loss is not finite" in caplog.text
    assert trainer.progress.step == 2 and sorted(trainer.curves[CURVE]) == [2]
    assert trainer.validation.record.best_step == 2


def test_what_is_printed(runs, caplog):
    caplog.set_level("INFO")
    watched(runs, SPLIT, *BY_STEPS, "--max_train_steps=12", "--learning_rate=0.5")
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("validation")]
    assert lines[0].startswith("validation of the base model: ")
    assert lines[1].startswith("validation after step 1: ") and "base model" in lines[1] and "the best so far" in lines[1]
    assert "at step" in lines[-1]


# ---------------------------------------------------------------- other networks, several processes

THIRD_PARTY = ("--network_module=tests.networks.third_party", "--save_model_as=pt")


def test_a_new_network_that_cannot_be_switched_off_stands_for_the_base_model(runs, caplog):
    caplog.set_level("INFO")
    base = runs.train(SPLIT, "--max_train_steps=1").validation.record.baseline
    trainer = watched(runs, SPLIT, *BY_STEPS, *THIRD_PARTY, "--max_train_steps=2", "--save_state_on_train_end", output="other")
    assert trainer.validation.record.baseline == pytest.approx(base)
    weights = f"--network_weights={runs.folder / 'other' / 't.pt'}"
    trainer = watched(runs, SPLIT, *BY_STEPS, *THIRD_PARTY, "--max_train_steps=1", weights, output="third")
    assert trainer.validation.record.baseline is None and "cannot be switched off" in caplog.text
    assert sorted(trainer.curves) == sorted(
        f"loss/validation/{name}"
        for name in (
            *("step_average", "step_divergence", "epoch_average", "epoch_divergence"),
            *(f"timestep_{t}" for t in (200, 400, 600, 800)),
        )
    )


TWO = """
import json, sys
from pathlib import Path
from tests.library.training.validating.test_validation import BY_STEPS, SPLIT, Stopped, Watched
from tests.tiny_runs import TinyRuns
folder, stops = Path(sys.argv[1]), sys.argv[2] == "1"
runs = TinyRuns.__new__(TinyRuns)
runs.folder, runs.pictures = folder, folder / "pictures"
flags = (SPLIT, *BY_STEPS, "--max_train_steps=3", "--save_best")
trainer = runs.train(*flags, output="two", trainer_class=Stopped if stops else Watched)
(folder / f"curves{trainer.rank}.json").write_text(json.dumps([trainer.curves, trainer.processes]))
"""


def train_in_two(folder: Path, environment: dict[str, str], *, stops: tuple[bool, bool] = (False, False)) -> list[int]:
    """Runs TWO as two processes that train together; ``stops``: which of them gets a signal. Returns their exit statuses."""
    (folder / "two.py").write_text(TWO)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**environment, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(folder / "two.py"), str(folder), str(int(stop))],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank, stop in enumerate(stops)
    ]
    try:
        return [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_two_processes_measure_what_one_does(runs, script_environment, tmp_path):
    one = watched(runs, SPLIT, *BY_STEPS, "--max_train_steps=3", "--save_best", output="one")
    runs.write_dataset(dataset="batch_size = 1")
    assert train_in_two(tmp_path, script_environment) == [0, 0]
    results = [json.loads((tmp_path / f"curves{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0] == results[1] and results[0][1] == 2
    for name, curve in one.curves.items():
        if not name.endswith("divergence"):
            assert results[0][0][name] == pytest.approx({str(step): value for step, value in curve.items()}, rel=1e-5), name
    assert runs.metadata("two", "t-best")["ss_steps"] == runs.metadata("one", "t-best")["ss_steps"]


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(runs, script_environment, tmp_path):
    runs.write_dataset(dataset="batch_size = 1")
    assert train_in_two(tmp_path, script_environment, stops=(False, True)) == [143, 143]
    state = read_description(runs.folder / "two" / "t-step00000002-state")
    assert state.progress.step == 2 and state.validation.finished_step == 1
