"""Checkpoints of few bits: read as the weights they stand for, or refused by name before anything of them is read."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from latentwire.bridge import quantised
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.checkpoint import make_bridge, save_bridge
from latentwire.bridge.engine import answer_logits
from latentwire.bridge.errors import ModelUnavailable
from latentwire.bridge.evaluation.context import open_context
from latentwire.bridge.models import FrozenLM, load_model, predicted_bytes
from latentwire.bridge.prompt import collate
from latentwire.service.__main__ import main
from latentwire.service.inference.runtime import Runtime
from latentwire.service.settings import Settings
from latentwire.training.loop import train
from latentwire.training.plan import plan
from tests.conftest import bridge_config, byte_tokenizer
from tests.integration.conftest import MakeConfig
from tests.integration.runs import quiet
from tests.integration.test_engine import rows_of, soft_of

BLOCK = 16
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP4_VALUES = torch.cat([FP4, -FP4])
Tensors = dict[str, Tensor]


def copy_as(folder: Path, source: Path, change: Callable[[str, Tensor], Tensors], method: dict[str, Any]) -> Path:
    """A copy of a model whose weights are changed one by one, and whose configuration says how."""
    shutil.copytree(source, folder)
    made: Tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        made |= change(name, weight)
    save_file({k: v.contiguous() for k, v in made.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return says(folder, method)


def says(folder: Path, method: dict[str, Any]) -> Path:
    """The folder, with a configuration that names how it is quantised."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ({"quantization_config": method} if method else {})))
    return folder


def linear(name: str) -> bool:
    return name.endswith("proj.weight")


def fp8(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).to(torch.float8_e4m3fn)


def by_block(weight: Tensor) -> Tensor:
    """The largest of each block, over its rows and columns."""
    rows, columns = weight.shape
    return weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK).abs().amax(dim=(1, 3)) / 448


def spread(scale: Tensor) -> Tensor:
    return scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


def packed_fp8(name: str, weight: Tensor) -> Tensors:
    if not linear(name):
        return {name: weight.to(torch.bfloat16)}
    scale = by_block(weight)
    return {name: fp8(weight, spread(scale)), f"{name}_scale_inv": scale}


def unpacked_fp8(name: str, weight: Tensor) -> Tensors:
    if not linear(name):
        return {name: weight.to(torch.bfloat16).float()}
    scale = spread(by_block(weight))
    return {name: fp8(weight, scale).float() * scale}


def packed_whole_fp8(name: str, weight: Tensor) -> Tensors:
    """One scale for a whole matrix, and one for what it is multiplied with."""
    if not linear(name):
        return {name: weight}
    scale = weight.abs().max() / 448
    activation = name.replace(".weight", ".activation_scale")
    return {name: fp8(weight, scale), f"{name}_scale_inv": scale, activation: torch.tensor(1.0)}


def unpacked_whole_fp8(name: str, weight: Tensor) -> Tensors:
    scale = weight.abs().max() / 448
    return {name: fp8(weight, scale).float() * scale if linear(name) else weight}


def by_row(weight: Tensor, most: float) -> Tensor:
    return weight.abs().amax(dim=1, keepdim=True) / most


def packed_rows(kind: str) -> Callable[[str, Tensor], Tensors]:
    def change(name: str, weight: Tensor) -> Tensors:
        if not linear(name):
            return {name: weight}
        scale = by_row(weight, 127 if kind == "int" else 448)
        return {name: integers(weight, scale) if kind == "int" else fp8(weight, scale), f"{name}_scale": scale}

    return change


def unpacked_rows(kind: str) -> Callable[[str, Tensor], Tensors]:
    def change(name: str, weight: Tensor) -> Tensors:
        if not linear(name):
            return {name: weight}
        scale = by_row(weight, 127 if kind == "int" else 448)
        return {name: (integers(weight, scale) if kind == "int" else fp8(weight, scale)).float() * scale}

    return change


def integers(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round().to(torch.int8)


def compressed(kind: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    shape = {"format": f"{kind}-quantized", "quantization_status": "compressed", "ignore": ["lm_head"]}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **shape}


def nearest_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Expert weights (E, in, out) as codes of blocks of 32 along ``in``, (E, out, blocks, 32), and exponents."""
    turned = weight.transpose(1, 2)
    blocks = turned.reshape(*turned.shape[:2], -1, 32)
    exponents = (blocks.abs().amax(dim=-1, keepdim=True) / 6).clamp(min=2.0**-20).log2().ceil()
    codes = (blocks / exponents.exp2())[..., None].sub(FP4_VALUES).abs().argmin(dim=-1)
    return codes, exponents


def expert(name: str) -> bool:
    return name.endswith(("gate_up_proj", "down_proj"))


def packed_fp4(name: str, weight: Tensor) -> Tensors:
    if not expert(name):
        return {name: weight}
    codes, exponents = nearest_fp4(weight)
    pairs = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return {f"{name}_blocks": pairs, f"{name}_scales": (exponents[..., 0] + 127).to(torch.uint8)}


def unpacked_fp4(name: str, weight: Tensor) -> Tensors:
    if not expert(name):
        return {name: weight}
    codes, exponents = nearest_fp4(weight)
    blocks = FP4_VALUES[codes] * exponents.exp2()
    return {name: blocks.reshape(*blocks.shape[:2], -1).transpose(1, 2)}


WHOLE = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
needs_compressed = pytest.mark.skipif(not find_spec("compressed_tensors"), reason="compressed-tensors is not installed")
WAYS = [
    pytest.param("llama", packed_fp8, unpacked_fp8, BLOCKS, id="fp8 in blocks"),
    pytest.param("llama", packed_whole_fp8, unpacked_whole_fp8, WHOLE, id="fp8 with one scale"),
    pytest.param("gpt-oss", packed_fp4, unpacked_fp4, {"quant_method": "mxfp4"}, id="mxfp4"),
    *(
        pytest.param(
            "llama", packed_rows(kind), unpacked_rows(kind), compressed(kind), id=f"{kind}8", marks=needs_compressed
        )
        for kind in ("float", "int")
    ),
]


@pytest.fixture(scope="session")
def plain_folders(model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with their whole weights; gpt-oss is what mxfp4 was made for."""
    folder, tokenizer = tmp_path_factory.mktemp("plain") / "gpt-oss", byte_tokenizer()
    shape: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    GptOssForCausalLM(GptOssConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **shape)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return {**model_folders, "gpt-oss": folder}


def weights(lm: FrozenLM) -> Tensors:
    return dict(lm.model.named_parameters())


def logits_of(lm: FrozenLM, soft: Tensor) -> Tensor:
    return answer_logits(lm, collate(rows_of(lm, [" a"] * 4), side="left"), soft)[0]


@pytest.mark.parametrize(("family", "pack", "unpack", "method"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_weights_are_read_as_what_they_stand_for_in_every_dtype(
    plain_folders: dict[str, Path], tmp_path: Path, family: str, pack: Any, unpack: Any, method: dict[str, Any],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    packed = copy_as(tmp_path / "packed", plain_folders[family], pack, method)
    by_hand = load_model(str(copy_as(tmp_path / "plain", plain_folders[family], unpack, {})), dtype=torch.float32)
    lm = load_model(str(packed), dtype=dtype)
    assert {p.dtype for p in weights(lm).values()} == {dtype} and not getattr(lm.model, "is_quantized", False)
    assert weights(lm).keys() == weights(by_hand).keys()
    for name, weight in weights(by_hand).items():
        torch.testing.assert_close(weights(lm)[name].float(), weight.to(dtype).float(), rtol=1e-2, atol=1e-6)
        assert lm.model.dtype != torch.float32 or torch.equal(weights(lm)[name], weight)
    assert predicted_bytes(str(packed), dtype) == sum(p.nbytes for p in weights(lm).values())


@pytest.mark.parametrize(("family", "pack", "unpack", "method"), WAYS)
def test_answers_and_gradients_are_those_of_the_whole_weights_but_for_rounding(
    plain_folders: dict[str, Path], tmp_path: Path, family: str, pack: Any, unpack: Any, method: dict[str, Any]
) -> None:
    lm = load_model(str(copy_as(tmp_path / "packed", plain_folders[family], pack, method)))
    whole = load_model(str(plain_folders[family]))
    made: list[tuple[Tensor, Tensor]] = []
    for each in (lm, whole):
        soft = soft_of(whole).requires_grad_()
        with torch.no_grad():
            logits_of(each, soft)  # some packed layers answer otherwise after a pass without gradients
        said = logits_of(each, soft)
        made.append((said.detach(), torch.autograd.grad(said.pow(2).sum(), soft)[0]))
    for packed, plain in zip(*made, strict=True):
        assert packed.isfinite().all() and 0 < (packed - plain).norm() < 0.25 * plain.norm()


def test_the_library_is_told_to_unpack_and_does_not_decide_by_the_device(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_as(tmp_path / "packed", model_folders["llama"], packed_fp8, BLOCKS)
    told: list[Any] = []
    read = AutoModelForCausalLM.from_pretrained

    def noting(*args: Any, **rest: Any) -> Any:
        told.append(rest["config"].quantization_config["dequantize"])
        return read(*args, **rest)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noting)
    load_model(str(folder))
    assert told == [True]


OTHERS = [
    {"quant_method": "gptq", "bits": 4, "group_size": 128},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
    {"quant_method": "modelopt", "quant_algo": "FP8"},
    {"quant_method": "gguf"},
    {"bits": 4},
]


@pytest.fixture
def bridged(model_folders: dict[str, Path], tmp_path: Path) -> tuple[Path, Path, Path]:
    """A checkpoint, and the folders of its sender and receiver, which a test may change."""
    folders = [Path(shutil.copytree(model_folders[family], tmp_path / family)) for family in ("neox", "llama")]
    sender, receiver = (load_model(str(folder)) for folder in folders)
    save_bridge(tmp_path / "bridge", make_bridge(bridge_config(sender, receiver)))
    return tmp_path / "bridge", folders[0], folders[1]


@pytest.mark.parametrize("method", OTHERS, ids=lambda method: "-".join(map(str, method.values())))
def test_any_other_method_is_refused_by_name_with_what_to_do(
    model_folders: dict[str, Path], tmp_path: Path, method: dict[str, Any]
) -> None:
    folder = says(Path(shutil.copytree(model_folders["llama"], tmp_path / "llama")), method)
    for name in (str(folder), f"random:{folder}"):
        with pytest.raises(ModelUnavailable) as caught:
            load_model(name)
        said = str(caught.value)
        assert name in said and method.get("quant_method", "an unnamed method") in said and "\n" not in said
        assert "save it unquantised" in said and "fp8, mxfp4, compressed-tensors" in said


@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_a_method_that_is_not_read_is_refused_wherever_a_model_is_named_and_before_it_is_read(
    bridged: tuple[Path, Path, Path], make: MakeConfig, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    checkpoint, sender, receiver = bridged
    folder = says(sender if role == "sender" else receiver, OTHERS[0])
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    config = make(sender=str(sender), receiver=str(receiver))
    here = Bridge.load(checkpoint)
    message = here.message(np.ones((2, 16), np.float32))
    for attempt in (
        lambda: plan(config, source_tokens=8, prompt_tokens=4, answer_tokens=4),
        lambda: train(config, quiet()),
        lambda: Runtime(Settings(), {"tiny": str(checkpoint)}),
        lambda: open_context(checkpoint, "world", limit=1, dtype="float16", receiver=None),
        lambda: here.encode("Mara sings."),
        lambda: here.generate(message, "Who?", max_tokens=2),
    ):
        if role == "receiver" and attempt.__code__.co_names[0] == "encode":
            continue  # it needs no receiver
        if role == "sender" and attempt.__code__.co_names[0] == "generate":
            continue
        with pytest.raises(ModelUnavailable, match="is quantised with gptq") as caught:
            attempt()
        assert str(folder) in str(caught.value)


def test_the_command_line_refuses_in_one_line(
    bridged: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, sender, receiver = bridged
    says(receiver, OTHERS[0])
    models = ["--sender", str(sender), "--receiver", str(receiver)]
    for command in (["plan", *models], ["train", *models, "--task", "world", "--out", str(sender.parent / "run")]):
        monkeypatch.setattr("sys.argv", ["latentwire", *command])
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr().err
        assert caught.value.code == 2 and "is quantised with gptq" in said and said.count("\n") == 1


def test_a_method_whose_package_is_missing_is_refused_with_how_to_get_it(
    bridged: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, sender, _ = bridged
    says(sender, compressed("int"))
    monkeypatch.setattr(quantised, "find_spec", lambda _: None)
    with pytest.raises(ModelUnavailable, match=r"pip install compressed-tensors, or save it unquantised"):
        Runtime(Settings(), {"tiny": str(checkpoint)})


def test_weights_of_eight_bits_without_a_method_are_refused_and_not_cast_without_their_scales(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_as(tmp_path / "packed", model_folders["llama"], packed_fp8, {})
    for attempt in (lambda: predicted_bytes(str(folder), torch.float32), lambda: load_model(str(folder))):
        with pytest.raises(ModelUnavailable, match=r"proj\.weight in F8_E4M3, and its config\.json names no quantisat"):
            attempt()


def test_a_model_of_whole_weights_is_read_as_the_library_reads_it_in_every_dtype(
    model_folders: dict[str, Path], lms: dict[str, FrozenLM]
) -> None:
    """Weights in the dtype asked for; rotary frequencies in float32, whatever that is."""
    for family in lms:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            lm = load_model(str(model_folders[family]), dtype=dtype)
            own = AutoModelForCausalLM.from_pretrained(model_folders[family], dtype=dtype)
            untrained = load_model(f"random:{model_folders[family]}", dtype=dtype)
            assert {p.dtype for p in (*weights(lm).values(), *weights(untrained).values())} == {dtype}
            for mine in (lm.model, untrained.model):
                for (name, buffer), (_, wanted) in zip(mine.named_buffers(), own.named_buffers(), strict=True):
                    assert buffer.dtype == wanted.dtype and torch.equal(buffer, wanted), name
            for (name, weight), wanted in zip(lm.model.named_parameters(), own.parameters(), strict=True):
                assert torch.equal(weight, wanted), name


@pytest.mark.parametrize("with_config", [True, False])
def test_a_folder_of_gguf_files_says_how_to_convert_them(
    bridged: tuple[Path, Path, Path], make: MakeConfig, with_config: bool
) -> None:
    checkpoint, sender, receiver = bridged
    for path in receiver.iterdir():
        if path.name != "config.json" or not with_config:
            path.unlink()
    (receiver / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    config = make(sender=str(sender), receiver=str(receiver))
    for attempt in (
        lambda: plan(config, source_tokens=8, prompt_tokens=4, answer_tokens=4),
        lambda: train(config, quiet()),
        lambda: Runtime(Settings(), {"tiny": str(checkpoint)}),
        lambda: load_model(str(receiver)),
        lambda: load_model(str(receiver / "model-Q4_K_M.gguf")),
    ):
        with pytest.raises(ModelUnavailable) as caught:
            attempt()
        said = str(caught.value)
        for part in ("gguf_file='model-Q4_K_M.gguf'", "fresh from_config model", "save_pretrained"):
            assert part in said
        assert "\n" not in said


def test_gguf_files_beside_whole_weights_are_passed_over(model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folders["llama"], tmp_path / "both"))
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    assert load_model(str(folder)).layers == 3


def test_a_run_and_a_plan_take_a_packed_model(model_folders: dict[str, Path], tmp_path: Path, make: MakeConfig) -> None:
    folder = copy_as(tmp_path / "packed", model_folders["llama"], packed_fp8, BLOCKS)
    config = make(receiver=str(folder), max_steps=2)
    planned = plan(config, source_tokens=8, prompt_tokens=4, answer_tokens=4).peak_bytes()
    whole = plan(make(), source_tokens=8, prompt_tokens=4, answer_tokens=4).peak_bytes()
    assert planned == whole
    manifest = train(config, Console(quiet=True))
    assert list(manifest.bridge.heads) == [str(folder)]
    assert Runtime(Settings(), {"packed": str(config.out)}).bridges["packed"].model_names[1] == str(folder)
