"""Settings from dataset files and from flags: who wins, what is refused, and how it is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from library.dataset import schema
from library.options.declare import groups_of, options_of
from library.options.train import TrainOptions
from tests.library.dataset.dataset_files import document, problems, read, write

# key: its values from the outermost place (the flag, where there is one) to the innermost table that may hold it
LAYERS = {
    "resolution": ["512,640", 640, [768, 640]],
    "batch_size": [2, 3, 4],
    "enable_bucket": [True, False, True],
    "min_bucket_reso": [128, 192, 320],
    "max_bucket_reso": [1088, 1152, 1216],
    "bucket_reso_steps": [32, 16, 128],
    "bucket_no_upscale": [True, False, True],
    "validation_split": [0.1, 0.2, 0.3],
    "validation_seed": [1, 2, 3],
    "network_multiplier": [0.5, 2],
    "caption_extension": [".a", ".b", ".c", ".d"],
    "class_tokens": ["g", "d", "s"],
    "cache_info": [True, False, True, False],
    "num_repeats": [2, 3, 4, 5],
    "is_reg": [True],
    "is_validation": [True, False],
    "loss_weight": [0.5, 2, 0.25],
    "alpha_mask": [True, False],
    "custom_attributes": [{"a": 1}, {"a": 2, "b": [True]}, {"c": {"d": "e"}}],
    "flip_aug": [True, False, True, False],
    "color_aug": [True, False, True, False],
    "random_crop": [True, False, True, False],
    "face_crop_aug_range": ["1.5,2", [2, 3], [2.5, 4.0], [1.0, 1.0]],
    "resize_interpolation": ["area", "box", "linear", "cubic"],
    "shuffle_caption": [True, False, True, False],
    "caption_separator": [";", "|", "/", "."],
    "keep_tokens": [1, 2, 3, 4],
    "keep_tokens_separator": ["|1|", "|2|", "|3|", "|4|"],
    "secondary_separator": [";1", ";2", ";3", ";4"],
    "enable_wildcard": [True, False, True, False],
    "caption_prefix": ["p1", "p2", "p3", "p4"],
    "caption_suffix": ["s1", "s2", "s3", "s4"],
    "caption_dropout_rate": [0.1, 0.2, 1, 0.4],
    "caption_dropout_every_n_epochs": [2, 3, 4, 5],
    "caption_tag_dropout_rate": [0.1, 0.2, 0.3, 0],
    "token_warmup_min": [2, 3, 4, 0],
    "token_warmup_step": [0.1, 10, 0.5, 0],
}
NAMES_OF_PATHS = ["image_dir", "metadata_file", "conditioning_data_dir"]  # no flag and one level: nothing to fall back to
READ_AS: dict[object, object] = {"512,640": (512, 640), 640: (640, 640), "1.5,2": (1.5, 2.0)}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (20, 20)).save(folder / "x.png")
    return folder


def as_read(key: str, value: object) -> object:
    if key in ("resolution", "face_crop_aug_range"):
        return tuple(value) if isinstance(value, list) else READ_AS.get(value)
    return value


@pytest.mark.parametrize("key", LAYERS)
@pytest.mark.parametrize("file_name", ["my.toml", "my.json"])
def test_subset_beats_dataset_beats_general_beats_flag_beats_default(key: str, file_name: str, images: Path, tmp_path: Path):
    row = next(row for row in schema.KEYS if row.name == key)
    places = [row.flag, *row.levels] if row.flag else list(row.levels)
    (tmp_path / "other").mkdir()
    content = document(images)
    tables = {
        schema.GENERAL: content["general"],
        schema.DATASETS: content["datasets"][0],
        schema.SUBSETS: content["datasets"][0]["subsets"][0],
    }
    content["datasets"].append({"resolution": 512, "subsets": [{"image_dir": str(tmp_path / "other")}]})  # is always trained
    if key == "resolution":
        del content["general"]["resolution"]
    flags: dict[str, object] = {}
    layers = list(zip(places, LAYERS[key], strict=True))
    for place, value in layers if key == "resolution" else [(None, row.default), *layers]:
        if place in tables:
            tables[place][key] = value
        elif place is not None:
            flags[place] = value
        settings = read(dataset_config=write(tmp_path, content, file_name), **flags)[0]
        owner = settings.subsets[0] if schema.SUBSETS in row.levels else settings
        assert getattr(owner, "resolution_wh" if key == "resolution" else key) == as_read(key, value), place
        if row.also_of_dataset and place != schema.SUBSETS:
            assert getattr(settings, key) == value


def test_every_key_of_the_schema_is_covered_here():
    assert list(LAYERS) == [key.name for key in schema.KEYS if key.name not in NAMES_OF_PATHS]


def test_built_in_defaults_are_those_of_the_command_line(images: Path, tmp_path: Path):
    (settings,) = read(dataset_config=write(tmp_path, document(images)))
    assert settings.place == "my.toml, [[datasets]] 1" and settings.subsets[0].place == "my.toml, [[datasets]] 1, subset 1"
    assert (settings.batch_size, settings.enable_bucket, settings.subsets[0].caption_extension) == (1, False, ".caption")
    assert settings.subsets[0].image_dir == images


def test_json_with_null_falls_through(images: Path, tmp_path: Path):
    content = document(images, dataset={"batch_size": None, "resolution": None}, subset={"keep_tokens": None})
    (settings,) = read(dataset_config=write(tmp_path, content, "my.json"), train_batch_size=3, keep_tokens=2)
    assert (settings.batch_size, settings.subsets[0].keep_tokens, settings.resolution_wh) == (3, 2, (512, 512))


def test_caption_extension_without_dot_and_misspelt_flag(images: Path, tmp_path: Path):
    (settings,) = read(dataset_config=write(tmp_path, document(images, subset={"caption_extension": "txt"})))
    assert settings.subsets[0].caption_extension == ".txt"
    (settings,) = read(dataset_config=write(tmp_path, document(images)), caption_extention=".cap")
    assert settings.subsets[0].caption_extension == ".cap"


def test_all_problems_of_a_file_are_reported_together(images: Path, tmp_path: Path):
    path = write(tmp_path, f"""
resolution = 512
[general]
image_dir = "x"
flip_aug = 1
[extra]
[[datasets]]
batch_size = 0
[[datasets.subsets]]
image_dir = '{images}x'
num_repeatz = 1
[[datasets]]
resolution = 500
[[datasets.subsets]]
num_repeats = true
color_aug = 1
""")  # fmt: skip
    found = problems(dataset_config=path)
    assert "my.toml: resolution stands outside of the tables: it belongs in [general] or [[datasets]]" in found
    assert any(text.startswith("my.toml: extra is not a table of a dataset file") for text in found)
    assert "my.toml, [general]: image_dir belongs in [[datasets.subsets]], not here" in found
    assert "my.toml, [general]: flip_aug is 1, but must be true or false" in found
    assert "my.toml, [[datasets]] 1: batch_size is 0, but must be at least 1" in found
    assert "my.toml, [[datasets]] 1, subset 1: num_repeatz is not a key (did you mean num_repeats?)" in found
    assert any(text.endswith("imagesx does not exist (did you mean images?)") for text in found)
    assert "my.toml, [[datasets]] 1: resolution is missing: set it here or in [general], or give --resolution" in found
    assert "my.toml, [[datasets]] 2, subset 1: num_repeats is true, but must be a whole number" in found
    assert "my.toml, [[datasets]] 2, subset 1: color_aug is 1, but must be true or false" in found
    assert "my.toml, [[datasets]] 2, subset 1: image_dir is missing: the folder of the images" in found
    assert any("width 500, which is not a multiple of 16" in text for text in found)
    assert len(found) == 13


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "there is no [[datasets]] table"),
        ("[datasets]\nresolution = 512", "[datasets] must be written [[datasets]]"),
        ("[[general]]\n[[datasets]]\n[[datasets.subsets]]", "general must be one table"),
        ("[general]\nresolution = 512\n[[datasets]]", "has no [[datasets.subsets]] table"),
        (
            "[general]\nresolution = 512\n[[datasets]]\n[datasets.subsets]\nimage_dir = 'x'",
            "subsets must be written [[datasets.subsets]]",
        ),
        ("[general]\nresolution = 512\n[[dataset]]", "dataset is not a table of a dataset file"),
        ("general = [\n", "my.toml"),
    ],
)
def test_shape_of_the_file(content: str, words: str, tmp_path: Path):
    assert words in "\n".join(problems(dataset_config=write(tmp_path, content)))


def test_wrong_resolution_is_not_also_called_missing(images: Path, tmp_path: Path):
    content = document(images)
    content["general"]["resolution"] = "big"
    assert problems(dataset_config=write(tmp_path, content)) == [
        'my.toml, [general]: resolution is "big", but must be a size in pixels, 1024 or [width, height]']  # fmt: skip
    del content["general"]["resolution"]
    (text,) = problems(dataset_config=write(tmp_path, content), resolution="5x5")
    assert text.startswith('--resolution: resolution is "5x5"')


def test_relative_folder_is_found_beside_the_file(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (settings,) = read(dataset_config=write(tmp_path, document(Path("images"))))
    assert settings.subsets[0].image_dir == tmp_path / "images"


def test_bucket_limits_are_checked(images: Path, tmp_path: Path):
    path = write(tmp_path, document(images, general={"enable_bucket": True, "max_bucket_reso": 448, "bucket_reso_steps": 24}))
    found = problems(dataset_config=path)
    assert any("multiple of 16" in text for text in found) and any("above max_bucket_reso 456" in text for text in found)


def test_subsets_without_repeats_are_left_out_with_a_warning(images: Path, tmp_path: Path):
    content = document(images)
    content["datasets"][0]["subsets"].append({"image_dir": "does/not/exist", "num_repeats": 0})
    (settings,) = read(dataset_config=write(tmp_path, content))
    assert len(settings.subsets) == 1 and "subset 2: num_repeats is 0: the subset is left out" in settings.warnings[0]
    content["general"]["num_repeats"] = 0
    assert "no subset is left" in problems(dataset_config=write(tmp_path, content))[0]


def test_a_folder_named_twice_counts_once(images: Path, tmp_path: Path):
    content = document(images)
    content["datasets"][0]["subsets"].append({"image_dir": str(images / ".." / "images"), "num_repeats": 9})
    (settings,) = read(dataset_config=write(tmp_path, content))
    assert [subset.num_repeats for subset in settings.subsets] == [1]
    assert "is already in my.toml, [[datasets]] 1, subset 1" in settings.warnings[0]
    content["datasets"].append(content["datasets"][0])
    assert len(read(dataset_config=write(tmp_path, content))) == 2


def test_metadata_subsets(images: Path, tmp_path: Path):
    metadata = write(tmp_path, {"x.png": {}}, "meta.json")
    (settings,) = read(dataset_config=write(tmp_path, document(images, subset={"metadata_file": str(metadata)})))
    assert settings.subsets[0].metadata_file == metadata and settings.subsets[0].image_dir == images
    without_folder = document(images, subset={"metadata_file": str(metadata)})
    del without_folder["datasets"][0]["subsets"][0]["image_dir"]
    assert read(dataset_config=write(tmp_path, without_folder))[0].subsets[0].image_dir is None

    mixed = document(images, subset={"metadata_file": str(metadata), "is_reg": True, "class_tokens": "x"})
    mixed["datasets"][0]["subsets"].append({"image_dir": str(images)})
    found = problems(dataset_config=write(tmp_path, mixed))
    place = "my.toml, [[datasets]] 1, subset"
    assert found == [
        f"{place} 1: class_tokens does nothing in a subset with a metadata_file: take one of the two out",
        f"{place} 1: is_reg does nothing in a subset with a metadata_file: take one of the two out",
        f"{place} 1 has a metadata_file and {place} 2 has none: put them into [[datasets]] of their own",
    ]

    missing = problems(dataset_config=write(tmp_path, document(images, subset={"metadata_file": str(tmp_path / "mata.json")})))
    assert "metadata_file" in missing[0] and "(did you mean meta.json?)" in missing[0]


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    return make_folders(tmp_path, "masks") / "masks"


def test_the_three_styles_in_one_file(images: Path, masks: Path, tmp_path: Path):
    metadata = write(tmp_path, {"x.png": {}}, "meta.json")
    content = document(images)
    content["datasets"].append({"subsets": [{"image_dir": str(images), "conditioning_data_dir": "masks"}]})
    content["datasets"].append({"subsets": [{"metadata_file": str(metadata), "image_dir": str(images)}]})
    content["datasets"].append({"subsets": [{"metadata_file": str(metadata), "conditioning_data_dir": str(masks)}]})
    read_ = [dataset.subsets[0] for dataset in read(dataset_config=write(tmp_path, content), masked_loss=True)]
    assert [(s.metadata_file is not None, s.conditioning_data_dir) for s in read_] == [
        (False, None), (False, masks), (True, None), (True, masks)]  # fmt: skip


def test_subsets_of_one_dataset_are_of_one_style(images: Path, masks: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    content = document(images, subset={"conditioning_data_dir": str(masks)})
    content["datasets"][0]["subsets"].append({"image_dir": str(tmp_path / "other")})
    place = "my.toml, [[datasets]] 1, subset"
    assert problems(dataset_config=write(tmp_path, content), masked_loss=True) == [
        f"{place} 1 has a conditioning_data_dir and {place} 2 has none: put them into [[datasets]] of their own"
    ]
    content["datasets"][0]["subsets"][1]["is_reg"] = True  # regularisation images accompany those with masks
    assert len(read(dataset_config=write(tmp_path, content), masked_loss=True)[0].subsets) == 2
    content["datasets"][0]["subsets"][0]["is_reg"] = True
    assert problems(dataset_config=write(tmp_path, content), masked_loss=True) == [
        f"{place} 1: is_reg does nothing in a subset with a conditioning_data_dir: take one of the two out"
    ]


def test_a_folder_of_masks_must_exist(images: Path, masks: Path, tmp_path: Path):
    content = document(images, subset={"conditioning_data_dir": str(tmp_path / "mask")})
    (text,) = problems(dataset_config=write(tmp_path, content), masked_loss=True)
    assert "subset 1: conditioning_data_dir" in text and "(did you mean masks?)" in text
    file = write(tmp_path, "", "file.toml")
    content["datasets"][0]["subsets"][0]["conditioning_data_dir"] = str(file)
    (text,) = problems(dataset_config=write(tmp_path, content), masked_loss=True)
    assert text.endswith("is a file, not a folder")


@pytest.mark.parametrize(
    "lines",
    [
        "custom_attributes = { diff_output_preservation = true, note = { by = 'me', marks = [1, 2] } }",
        "[datasets.subsets.custom_attributes]\ndiff_output_preservation = true\n"
        "[datasets.subsets.custom_attributes.note]\nby = 'me'\nmarks = [1, 2]",
    ],
)
def test_attributes_as_a_table_of_either_form(lines: str, images: Path, tmp_path: Path):
    head = f"[general]\nresolution = 512\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{images}'\n"
    subset = read(dataset_config=write(tmp_path, head + lines))[0].subsets[0]
    assert subset.custom_attributes == {"diff_output_preservation": True, "note": {"by": "me", "marks": [1, 2]}}
    assert type(subset.custom_attributes["note"]) is dict


def test_attributes_of_an_inner_table_replace_those_of_an_outer_one(images: Path, tmp_path: Path):
    content = document(images, general={"custom_attributes": {"a": 1}}, dataset={"custom_attributes": {"b": 2}})
    assert read(dataset_config=write(tmp_path, content))[0].subsets[0].custom_attributes == {"b": 2}


def test_keys_that_no_subset_below_can_use_are_told(images: Path, tmp_path: Path):
    metadata = write(tmp_path, {"x.png": {}}, "meta.json")
    keys = {"class_tokens": "x", "cache_info": True, "flip_aug": True}
    content = document(images, general=keys, dataset={"caption_extension": ".txt"}, subset={"metadata_file": str(metadata)})
    (settings,) = read(dataset_config=write(tmp_path, content))
    end = "does nothing: it is not for subsets with a metadata_file, and there are no others"
    assert settings.warnings == (
        f"my.toml, [[datasets]] 1: caption_extension {end}",
        f"my.toml, [general]: class_tokens {end}",
        f"my.toml, [general]: cache_info {end}",
    )
    (subset,) = settings.subsets
    assert (subset.class_tokens, subset.cache_info, subset.caption_extension) == (None, False, ".caption")
    content["datasets"].append({"subsets": [{"image_dir": str(images)}]})
    assert len(read(dataset_config=write(tmp_path, content))[0].warnings) == 1
    (settings,) = read(in_json=metadata, resolution="512", cache_info=True, caption_extension=".caption")
    assert settings.warnings == (f"--cache_info {end}",)


def make_folders(parent: Path, *names: str) -> Path:
    for name in names:
        (parent / name).mkdir(parents=True)
    return parent


def test_named_folders_on_the_command_line(tmp_path: Path):
    train = make_folders(tmp_path / "train", "10_a cat", "2_dog_x", "notes")
    reg = make_folders(tmp_path / "reg", "1_cat")
    (settings,) = read(train_data_dir=train, reg_data_dir=reg, resolution="512", train_batch_size=2, shuffle_caption=True)
    assert settings.batch_size == 2 and settings.place == "--train_data_dir"
    assert [(subset.num_repeats, subset.class_tokens, subset.is_reg, subset.shuffle_caption) for subset in settings.subsets] == [
        (10, "a cat", False, True), (2, "dog_x", False, True), (1, "cat", True, True)]  # fmt: skip
    assert settings.subsets[0].place == "--train_data_dir, folder 10_a cat"
    assert "left out: notes" in settings.warnings[0]


def test_folder_without_the_layout(images: Path, tmp_path: Path):
    (text,) = problems(train_data_dir=images, resolution="512")
    assert "has images directly inside" in text and str(images / "10_cat") in text
    (text,) = problems(train_data_dir=tmp_path / "image", resolution="512")
    assert "--train_data_dir: " in text and "did you mean images?" in text


def test_in_json(images: Path, tmp_path: Path):
    metadata = write(tmp_path, {"x.png": {}}, "meta.json")
    (settings,) = read(in_json=metadata, train_data_dir=images, resolution="512", dataset_repeats=3)
    (subset,) = settings.subsets
    assert (subset.metadata_file, subset.image_dir, subset.num_repeats) == (metadata, images, 3)
    assert problems(in_json=tmp_path / "none.json", resolution="512") == [
        f"--in_json: {tmp_path / 'none.json'} does not exist (did you mean meta.json?)"
    ]


def test_masks_of_named_folders(tmp_path: Path):
    train = make_folders(tmp_path / "train", "10_a cat", "2_dog")
    reg = make_folders(tmp_path / "reg", "1_cat")
    masks = make_folders(tmp_path / "masks", "10_a cat", "1_cat")
    given = {"train_data_dir": train, "reg_data_dir": reg, "conditioning_data_dir": masks, "resolution": "512"}
    (settings,) = read(**given, masked_loss=True)
    assert [subset.conditioning_data_dir for subset in settings.subsets] == [masks / "10_a cat", masks, None]
    given["conditioning_data_dir"] = tmp_path / "mask"
    (text,) = problems(**given, masked_loss=True)
    assert text.startswith("--conditioning_data_dir: ") and text.endswith("(did you mean masks?)")
    del given["conditioning_data_dir"]
    (text,) = problems(**given, masked_loss=True)
    assert text.startswith(
        "--masked_loss finds no masks, because no subset of --train_data_dir has any: give --conditioning_data_dir"
    )


def test_masks_of_a_metadata_file(images: Path, tmp_path: Path):
    masks = make_folders(tmp_path, "masks") / "masks"
    metadata = write(tmp_path, {"x.png": {}}, "meta.json")
    given = {"in_json": metadata, "train_data_dir": images, "resolution": "512", "conditioning_data_dir": masks}
    assert read(**given, masked_loss=True)[0].subsets[0].conditioning_data_dir == masks
    place = f"--in_json {metadata}"
    assert problems(**given)[0].startswith(f"{place}: conditioning_data_dir names mask images")


def test_nothing_given():
    (text,) = problems(resolution="512")
    assert "give --dataset_config FILE, or --train_data_dir" in text


def test_flags_are_ignored_where_a_file_is_given(images: Path, tmp_path: Path):
    (settings,) = read(dataset_config=write(tmp_path, document(images)), train_data_dir=tmp_path / "none", in_json="none.json")
    assert [subset.image_dir for subset in settings.subsets] == [images]


def test_every_flag_of_the_schema_exists():
    known = {option.name for group in groups_of(TrainOptions).values() for option in options_of(group)}
    assert {key.flag for key in schema.KEYS if key.flag} <= known


def test_a_json_file_is_told_of_json(images: Path, tmp_path: Path):
    content = document(images)
    one = write(tmp_path, {**content, "datasets": content["datasets"][0]}, "one.json")
    assert problems(dataset_config=one) == ['one.json: "datasets" must be a list: write "datasets": [{...}]']
    content["datasets"][0]["subsets"] = content["datasets"][0]["subsets"][0]
    two = write(tmp_path, content, "two.json")
    assert problems(dataset_config=two) == ['two.json, [[datasets]] 1: "subsets" must be a list: write "subsets": [{...}]']
    none = write(tmp_path, {"datasets": []}, "none.json")
    assert problems(dataset_config=none) == ['none.json: there is no dataset in the list "datasets": at least one is needed']


def test_a_mixed_list_in_toml(images: Path, tmp_path: Path):
    text = f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\ncustom_attributes = {{a = [1, "x"]}}\n'
    (problem,) = problems(dataset_config=write(tmp_path, text))
    assert "my.toml, line 5: Not a homogeneous array: here a list in TOML holds values of one kind" in problem


def test_flags_that_no_table_falls_back_to(images: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "other" / "x.png")
    content = document(images, dataset={"batch_size": 2}, subset={"num_repeats": 3, "keep_tokens": 1})
    content["datasets"][0]["subsets"].append({"image_dir": str(tmp_path / "other"), "num_repeats": 4})
    path = write(tmp_path, content)
    flags = {"resolution": "128", "train_batch_size": 8, "dataset_repeats": 9, "keep_tokens": 2, "enable_bucket": True}
    (dataset,) = read(dataset_config=path, **flags)
    assert dataset.warnings == (
        "--resolution, --train_batch_size, --dataset_repeats do nothing: my.toml sets its own in every dataset or subset",
    )
    assert read(dataset_config=path, resolution="512", train_batch_size=2)[0].warnings == ()  # the same values
    assert read(train_data_dir=str(_named(tmp_path)), resolution="64")[0].warnings == ()


def _named(folder: Path) -> Path:
    (folder / "named" / "2_cat").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(folder / "named" / "2_cat" / "x.png")
    return folder / "named"
