"""networks/convert_anima_lora_to_comfy.py: both directions without loss, and refusals that write nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.files.safetensors_file import read_header, read_tensors, save_safetensors
from networks.convert_anima_lora_to_comfy import main
from networks.weights_file import sshs_hashes, write_lora_file
from tests.networks.full_anima_lora import METADATA, full_lora, full_tensors

SCRIPT = Path(__file__).resolve().parents[2] / "networks" / "convert_anima_lora_to_comfy.py"
SMALL = {"blocks": 1, "adapter_blocks": 1, "layers": 1}
NAME = "lora_unet_blocks_0_mlp_layer1"


def small_pair(name=NAME, *, alpha: float | None = 1.0) -> dict[str, torch.Tensor]:
    tensors = {f"{name}.lora_down.weight": torch.randn(2, 4), f"{name}.lora_up.weight": torch.randn(4, 2)}
    return tensors if alpha is None else {**tensors, f"{name}.alpha": torch.tensor(alpha)}


def comfy_pair() -> dict[str, torch.Tensor]:
    name = "diffusion_model.blocks.0.mlp.layer1"
    return {f"{name}.lora_A.weight": torch.randn(2, 4), f"{name}.lora_B.weight": torch.randn(4, 2)}


def diffusers_pair() -> dict[str, torch.Tensor]:
    return {key.replace("diffusion_model.blocks.0.mlp.layer1", "transformer.transformer_blocks.0.ff.net.0.proj"): tensor
            for key, tensor in comfy_pair().items()}  # fmt: skip


def saved(path: Path, tensors, metadata=None) -> Path:
    write_lora_file(path, tensors, metadata)
    return path


def contents(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    header = read_header(path)
    return dict(read_tensors(header)), header.metadata


def refusal(capsys, *arguments: object) -> str:
    """What main() says on stderr; it must have ended with status 2."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ")
    return printed.err


# --- what it does


def test_all_modules_there_and_back(tmp_path, capsys):
    tensors = {key: tensor.bfloat16() for key, tensor in full_tensors().items()}
    assert len(tensors) == 3 * 710
    source = saved(tmp_path / "a.safetensors", tensors, METADATA)
    main([str(source), str(tmp_path / "comfy.safetensors")])
    main([str(tmp_path / "comfy.safetensors"), str(tmp_path / "back.safetensors"), "--reverse"])
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()
    comfy, metadata = contents(tmp_path / "comfy.safetensors")
    assert metadata == {**METADATA, **sshs_hashes(comfy, METADATA)} and len(comfy) == len(tensors)
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {tmp_path / 'comfy.safetensors'}: 710 modules under ComfyUI's names",
        f"wrote {tmp_path / 'back.safetensors'}: 710 modules under the names of kohya-ss/sd-scripts",
    ]


def test_metadata_is_kept_and_hashes_are_made_anew(tmp_path):
    metadata = {"ss_x": "1", "other": "2", "sshs_model_hash": "old", "sshs_legacy_hash": "old"}
    save_safetensors(tmp_path / "a.safetensors", small_pair(), metadata)
    main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")])
    tensors, found = contents(tmp_path / "b.safetensors")
    assert found == {"ss_x": "1", "other": "2", **sshs_hashes(tensors, {"ss_x": "1"})}


def test_no_metadata_stays_none(tmp_path):
    saved(tmp_path / "a.safetensors", small_pair())
    main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")])
    assert contents(tmp_path / "b.safetensors")[1] == {}


def test_a_pickle_is_read(tmp_path):
    tensors = small_pair()
    torch.save(tensors, tmp_path / "a.pt")
    main([str(tmp_path / "a.pt"), str(tmp_path / "b.safetensors")])
    assert torch.equal(
        contents(tmp_path / "b.safetensors")[0]["diffusion_model.blocks.0.mlp.layer1.alpha"], tensors[f"{NAME}.alpha"]
    )


def test_diffusers_and_back(tmp_path, capsys):
    tensors = full_tensors(**SMALL, alpha=3.0)
    source = saved(tmp_path / "a.safetensors", tensors, METADATA)
    main([str(source), str(tmp_path / "b.safetensors"), "--format", "diffusers", "--denoiser_only"])
    wrote, left, folded = capsys.readouterr().out.splitlines()
    assert wrote.endswith(": 32 modules under diffusers' names") and left == "left out: 7 modules of the text encoder"
    assert folded.startswith(
        "alpha / rank is multiplied into lora_B of 26 modules (rounding changed no weight by more than 6e-08"
    )  # 6 have rank 3
    theirs, metadata = contents(tmp_path / "b.safetensors")
    assert all("lora" in key for key in theirs) and metadata == {**METADATA, **sshs_hashes(theirs, METADATA)}
    main([str(tmp_path / "b.safetensors"), str(tmp_path / "c.safetensors"), "--reverse"])
    back, _ = contents(tmp_path / "c.safetensors")
    for name in (key.removesuffix(".alpha") for key in back if key.endswith(".alpha")):
        ours, again = ({part: side[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha")}
                       for side in (tensors, back))  # fmt: skip
        rank = len(again["lora_down.weight"])
        assert float(again["alpha"]) == rank
        assert torch.equal(again["lora_up.weight"], ours["lora_up.weight"] * (float(ours["alpha"]) / rank))
        assert torch.equal(again["lora_down.weight"], ours["lora_down.weight"])


@pytest.mark.parametrize("layout", ["comfy", "diffusers"])
def test_the_result_is_what_a_run_saves_with_save_format(layout, tmp_path):
    network = full_lora(**SMALL, text_encoder=layout == "comfy")
    network.save_weights(tmp_path / "ours.safetensors", None, METADATA)
    network.save_weights_as(layout, tmp_path / "run.safetensors", None, METADATA)
    main([str(tmp_path / "ours.safetensors"), str(tmp_path / "tool.safetensors"), "--format", layout])
    assert (tmp_path / "tool.safetensors").read_bytes() == (tmp_path / "run.safetensors").read_bytes()


def test_rounding_is_told(tmp_path, capsys):
    tensors = {key: tensor.bfloat16() for key, tensor in small_pair(alpha=0.7).items()}
    saved(tmp_path / "a.safetensors", tensors)
    main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--format=diffusers"])
    assert "(rounding changed no weight by more than 0.00" in capsys.readouterr().out


def test_only_what_changes_no_digit_is_without_rounding(tmp_path, capsys):
    for rank, said in ((4, "(rounding changed no weight by more than 4e-08"), (6, "(without rounding)")):
        down, up = torch.ones(rank, 4), torch.linspace(0.1, 1, 8 * rank).reshape(8, rank)
        tensors = {f"{NAME}.lora_down.weight": down, f"{NAME}.lora_up.weight": up, f"{NAME}.alpha": torch.tensor(3.0)}
        saved(tmp_path / "a.safetensors", tensors)
        main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--format=diffusers", "--overwrite"])
        assert said in capsys.readouterr().out


def test_strength_in_diffusers_metadata_moves_into_alpha(tmp_path):
    metadata = {"lora_adapter_metadata": '{"transformer.lora_alpha": 6, "transformer.r": 2}', "note": "x"}
    save_safetensors(tmp_path / "a.safetensors", diffusers_pair(), metadata)
    main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--reverse"])
    tensors, found = contents(tmp_path / "b.safetensors")
    assert float(tensors[f"{NAME}.alpha"]) == 6.0 and found["note"] == "x" and "lora_adapter_metadata" not in found


def test_what_the_reference_s_converter_wrote_wrongly_is_mended(tmp_path):
    wrong = {"blocks.0.adaln_modulation.self_attn.1": "blocks_0_adaln_modulation_self_attn_1",
             "blocks.0.adaln_modulation.cross_attn.2": "blocks_0_adaln_modulation_cross_attn_2",
             "t.embedder.1.linear_1": "t_embedder_1_linear_1"}  # fmt: skip
    halves = {f"diffusion_model.{path}.lora_{half}.weight": torch.randn(2, 2) for path in wrong for half in "AB"}
    saved(tmp_path / "a.safetensors", halves)
    main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--reverse"])
    tensors, _ = contents(tmp_path / "b.safetensors")
    assert {key.partition(".")[0] for key in tensors} == {f"lora_unet_{name}" for name in wrong.values()}


def test_a_file_of_two_layouts_becomes_ours(tmp_path):
    """ComfyUI's names for the denoiser with sd-scripts' for the text encoder: ComfyUI takes both in one file."""
    saved(tmp_path / "a.safetensors", {**comfy_pair(), **small_pair("lora_te_layers_0_mlp_up_proj")})
    main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--reverse"])
    assert {key.partition(".")[0] for key in contents(tmp_path / "b.safetensors")[0]} == {NAME, "lora_te_layers_0_mlp_up_proj"}


def test_overwrite(tmp_path, capsys):
    source, target = saved(tmp_path / "a.safetensors", small_pair()), tmp_path / "b.safetensors"
    target.write_bytes(b"mine")
    assert f"DST {target} is there already: choose another name, or give --overwrite" in refusal(capsys, source, target)
    assert target.read_bytes() == b"mine"
    main([str(source), str(target), "--overwrite"])
    assert len(contents(target)[0]) == 3


def test_as_a_process(tmp_path):
    saved(tmp_path / "a.safetensors", small_pair())
    command = [sys.executable, str(SCRIPT), "a.safetensors", "b.safetensors"]
    first, second = (subprocess.run(command, cwd=tmp_path, capture_output=True, text=True) for _ in range(2))
    assert (first.returncode, first.stdout, first.stderr) == (0, "wrote b.safetensors: 1 modules under ComfyUI's names\n", "")
    assert (second.returncode, second.stdout) == (2, "")
    assert second.stderr.startswith("error: DST b.safetensors is there already") and "Traceback" not in second.stderr


# --- what it refuses

BAD_FILES = {
    "comfy forward": (comfy_pair(), [], "has ComfyUI's names already: --reverse gives it this project's names"),
    "comfy to diffusers": (
        comfy_pair(),
        ["--format=diffusers"],
        "has ComfyUI's names: --reverse gives it this project's, which can then be converted to diffusers' names",
    ),
    "ours reversed": (small_pair(), ["--reverse"], "has the names of kohya-ss/sd-scripts, this project's, already: leave out"),
    "diffusers forward": (diffusers_pair(), [], "has diffusers' names: --reverse gives it this project's, which can then be"),
    "diffusers twice": (diffusers_pair(), ["--format=diffusers"], "has diffusers' names already"),
    "mixed": (
        {**small_pair(), **comfy_pair()},
        [],
        "mixes ComfyUI's names (2 tensors) and the names of kohya-ss/sd-scripts (3 tensors): --reverse",
    ),
    "sdxl": (small_pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"), [], "is a LoRA for SDXL, not for Anima"),
    "sdxl reversed": (small_pair("lora_unet_input_blocks_4_1_proj_in"), ["--reverse"], "is a LoRA for SDXL, not for Anima"),
    "lokr": ({f"{NAME}.lokr_w1": torch.zeros(2, 2)}, [], "is no plain LoRA but a LoKr file"),
    "dit": ({"blocks.0.mlp.layer1.weight": torch.zeros(2, 2), "llm_adapter.embed.weight": torch.zeros(2)}, [], "is an Anima DiT"),
    "nothing": ({"x": torch.zeros(2)}, [], "is no LoRA file"),
    "a strange name": ({**small_pair(), **small_pair("lora_unet_blocks_0_mlp_layer7")}, [], "has: lora_unet_blocks_0_mlp_layer7 (did you mean lora_unet_blocks_0_mlp_layer"),
    "text encoder alone": (small_pair("lora_te_layers_0_mlp_up_proj"), ["--denoiser_only"], "has only modules of the text encoder (1)"),
    "not finite": (small_pair(alpha=float("nan")), [], f"a.safetensors: {NAME} has values that are not finite"),
    "text encoder for diffusers": (
        small_pair("lora_te_layers_0_mlp_up_proj"),
        ["--format=diffusers"],
        "no place for 1 modules of the text encoder (lora_te_layers_0_mlp_up_proj); --denoiser_only leaves them out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case, tmp_path, capsys):
    tensors, flags, said = BAD_FILES[case]
    source = saved(tmp_path / "a.safetensors", tensors)
    assert said in refusal(capsys, source, tmp_path / "b.safetensors", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_damaged_files(tmp_path, capsys):
    whole = saved(tmp_path / "whole.safetensors", small_pair()).read_bytes()
    for name, data, said in (
        ("cut", whole[:-8], "is truncated"),
        ("empty", b"", "has only 0 bytes"),
        ("text", b"x" * 100, "damaged"),
    ):
        (tmp_path / f"{name}.safetensors").write_bytes(data)
        assert said in refusal(capsys, tmp_path / f"{name}.safetensors", tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()


def test_bad_targets(tmp_path, capsys):
    source = saved(tmp_path / "a.safetensors", small_pair())
    before = source.read_bytes()
    (tmp_path / "folder.safetensors").mkdir()
    for target, said in (
        (tmp_path / "folder.safetensors", "is a folder: add the name of the new file"),
        (tmp_path / "b.ckpt", "let its name end in .safetensors"),
        (tmp_path / "b", "let its name end in .safetensors"),
        (tmp_path / "nowhere" / "b.safetensors", f"there is no folder {tmp_path / 'nowhere'}"),
        (source, "is the file to convert itself"),
        (tmp_path / "folder.safetensors" / ".." / "a.safetensors", "is the file to convert itself"),
    ):
        assert said in refusal(capsys, source, target, "--overwrite")
    assert source.read_bytes() == before and sorted(path.name for path in tmp_path.iterdir()) == [
        "a.safetensors",
        "folder.safetensors",
    ]


def test_bad_sources(tmp_path, capsys):
    saved(tmp_path / "my_lora.safetensors", small_pair())
    new = tmp_path / "new.safetensors"
    said = refusal(capsys, tmp_path / "my_lore.safetensors", new)
    assert "SRC" in said and "does not exist" in said and "did you mean my_lora.safetensors" in said
    assert "is a folder" in refusal(capsys, tmp_path, new)
    both = refusal(capsys, tmp_path, tmp_path / "new.txt")
    assert "several things must be mended" in both and "is a folder" in both and ".safetensors" in both


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: SRC, DST"),
        (["a"], "the following arguments are required: DST"),
        (["a", "b", "c"], "unrecognized arguments: c"),
        (["a", "b", "--revers"], "(did you mean --reverse?)"),
        (["a", "b", "--format", "kohya"], "invalid choice: 'kohya'"),
        (["a", "b", "--reverse", "--format", "comfy"], "--reverse and --format=comfy say opposite things"),
    ],
)
def test_bad_commands(arguments, said, capsys):
    assert said in refusal(capsys, *arguments)


def test_mistakes_are_told_before_torch_is_imported():
    code = "import sys, networks.convert_anima_lora_to_comfy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parents[1]).returncode == 0
