"""Frozen models of five families: what is read, what is not run, and which one it is."""

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, OPTConfig, OPTForCausalLM

from latentwire.bridge.checkpoint import check_identity
from latentwire.bridge.engine import generate
from latentwire.bridge.errors import IncompatibleBridge, InvalidRequest, ModelUnavailable
from latentwire.bridge.models import (
    FrozenLM,
    fingerprint_of,
    hidden_states,
    load_model,
    pad_sources,
    pass_bytes,
    predicted_bytes,
)
from latentwire.bridge.prompt import compose, layout_for
from latentwire.bridge.reader import SourceTokens, text_ids, tokenize_source
from latentwire.bridge.sampling import SamplingParams
from tests.conftest import FAMILIES, SHAPE, byte_tokenizer, write_model

TEXTS = ["Mara lives in Rome.", "Ben sings.", "The lamp is in the attic, and nobody knows why."]


@pytest.fixture
def folder(tmp_path: Path, model_folders: dict[str, Path]) -> Path:
    """A copy of a model that a test may damage."""
    return Path(shutil.copytree(model_folders["llama"], tmp_path / "llama"))


def tokenised(lm: FrozenLM, texts: list[str] = TEXTS) -> list[SourceTokens]:
    return [tokenize_source(lm, text, lm.source_layout, max_tokens=200) for text in texts]


def blocks(lm: FrozenLM) -> list[nn.Module]:
    return next(list(m) for m in lm.model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)


def padded(sources: list[SourceTokens], *, side: str, extra: int, filler: int) -> tuple[Tensor, Tensor]:
    S = max(len(source.ids) for source in sources) + extra
    ids, mask = torch.full((len(sources), S), filler), torch.zeros(len(sources), S, dtype=torch.bool)
    for i, source in enumerate(sources):
        n = len(source.ids)
        here = slice(S - n, S) if side == "left" else slice(0, n)
        ids[i, here], mask[i, here] = torch.tensor(source.ids), True
    return ids, mask


@pytest.mark.parametrize("layers", [(0,), (1,), (2,), (2, 1), (0, 2)])
def test_states_are_those_the_library_reports(lm: FrozenLM, layers: tuple[int, ...]) -> None:
    ids, mask = pad_sources(lm, tokenised(lm))
    with torch.no_grad():
        wanted = lm.model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
            output_hidden_states=True,
        ).hidden_states
    states = hidden_states(lm, ids, mask, layers)
    expected = torch.cat([wanted[layer] for layer in layers], dim=-1)
    if 0 in layers and lm.model.config.model_type == "gpt2":  # the library adds position embeddings to its layer 0
        assert states.shape == expected.shape
    else:
        torch.testing.assert_close(states[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_nothing_above_the_layer_read_runs_and_nothing_is_cached(lm: FrozenLM) -> None:
    calls: list[int] = []
    cached: list[object] = []

    def note(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, kwargs: dict[str, object]) -> None:
            calls.append(index)
            cached.append(kwargs.get("past_key_values", kwargs.get("layer_past")))

        return hook

    handles = [b.register_forward_pre_hook(note(i), with_kwargs=True) for i, b in enumerate(blocks(lm), start=1)]
    hidden_states(lm, *pad_sources(lm, tokenised(lm)), (2,))
    for handle in handles:
        handle.remove()
    assert calls == [1, 2] and set(cached) == {None}


def test_reading_leaves_no_hook_behind(lm: FrozenLM) -> None:
    modules = [lm.model.get_input_embeddings(), *blocks(lm)]
    before = [len(module._forward_hooks) for module in modules]
    hidden_states(lm, *pad_sources(lm, tokenised(lm)), (0, 2))
    with pytest.raises(IncompatibleBridge):
        hidden_states(lm, *pad_sources(lm, tokenised(lm)), (4,))
    assert [len(module._forward_hooks) for module in modules] == before
    assert lm.model(input_ids=torch.tensor([[5, 6]])).logits.shape[1] == 2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("extra, filler", [(0, 0), (7, 2), (30, 99)])
def test_states_depend_on_neither_batch_nor_padding(lm: FrozenLM, side: str, extra: int, filler: int) -> None:
    sources = tokenised(lm)
    ids, mask = padded(sources, side=side, extra=extra, filler=filler)
    states = hidden_states(lm, ids, mask, (2,))
    for i, source in enumerate(sources):
        alone = hidden_states(lm, *pad_sources(lm, [source]), (2,))[0]
        torch.testing.assert_close(states[i][mask[i]], alone, rtol=1e-3, atol=1e-4)


def test_a_row_of_padding_is_finite_and_spoils_no_neighbour(lm: FrozenLM) -> None:
    ids, mask = pad_sources(lm, [tokenised(lm)[0]] * 2)
    mask[1] = False
    states = hidden_states(lm, ids, mask, (2,))
    assert states.isfinite().all()
    torch.testing.assert_close(states[0], hidden_states(lm, ids[:1], mask[:1], (2,))[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_the_model_does_not_have_is_refused_with_both_numbers(lm: FrozenLM, layer: int) -> None:
    with pytest.raises(IncompatibleBridge, match=rf"layer {layer} was asked for; .* has 0 to 3"):
        hidden_states(lm, *pad_sources(lm, tokenised(lm)), (1, layer))


def test_a_loaded_model_is_frozen_and_knows_its_shape(lm: FrozenLM) -> None:
    assert not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())
    assert (lm.width, lm.layers, lm.max_tokens) == (32, 3, 256)
    assert (lm.ref.name, lm.ref.fingerprint) == (lm.name, fingerprint_of(lm.name))


def test_the_cache_size_is_that_of_a_real_cache(lm: FrozenLM) -> None:
    cache = lm.model(input_ids=torch.arange(5, 12)[None], use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert lm.kv_bytes(7) == held


def test_a_source_has_bos_once_and_is_cut_only_when_asked(lms: dict[str, FrozenLM]) -> None:
    lm = lms["llama"]
    source = tokenize_source(lm, "abc", lm.source_layout, max_tokens=9)
    assert (source.ids[0], source.ids.count(0), len(source.ids), source.full_length) == (0, 1, 4, 4)
    cut = tokenize_source(lm, "abcdef", lm.source_layout, max_tokens=3, truncate=True)
    assert (cut.ids, cut.full_length) == (source.ids[:3], 7)
    with pytest.raises(InvalidRequest, match=r"has 7 sender tokens; this bridge reads at most 3"):
        tokenize_source(lm, "abcdef", lm.source_layout, max_tokens=3)


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_an_empty_source_is_refused(lms: dict[str, FrozenLM], text: str) -> None:
    with pytest.raises(InvalidRequest, match="is empty"):
        tokenize_source(lms["llama"], text, lms["llama"].source_layout, max_tokens=9)


def flip_a_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def edit_json(name: str, **changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


@pytest.mark.parametrize(
    "part, change",
    [
        ("weights", flip_a_weight),
        ("config", edit_json("config.json", rms_norm_eps=0.5)),
        ("tokenizer", edit_json("tokenizer.json", version="1.1")),
    ],
)
def test_a_changed_file_changes_its_part_of_the_fingerprint(
    folder: Path, part: str, change: Callable[[Path], None]
) -> None:
    before = fingerprint_of(str(folder))
    ref = load_model(str(folder)).ref
    check_identity(ref, before, "sender")
    change(folder)
    after = fingerprint_of(str(folder))
    assert {p for p in ("config", "weights", "tokenizer") if getattr(before, p) != getattr(after, p)} == {part}
    have, want = getattr(after, part), getattr(before, part)
    with pytest.raises(IncompatibleBridge, match=rf"sender .* whose {part} is {want}; this one's is {have}"):
        check_identity(ref, after, "sender")


def in_the_hubs_cache(folder: Path, root: Path) -> Path:
    """A model folder as the Hub's client keeps it: large files under their digests, and links by their names."""
    blobs, snapshot = root / "models--org--tiny" / "blobs", root / "models--org--tiny" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        large = file.suffix == ".safetensors"
        digest = hashlib.new("sha256" if large else "sha1", file.read_bytes()).hexdigest()
        shutil.copy(file, blobs / digest)
        (snapshot / file.name).symlink_to(Path("../../blobs") / digest)
    return snapshot


def test_weights_in_the_hubs_cache_are_known_by_the_name_it_gives_them_and_have_the_same_fingerprint(
    folder: Path, tmp_path: Path
) -> None:
    cached = in_the_hubs_cache(folder, tmp_path / "hub")
    assert fingerprint_of(str(cached)) == fingerprint_of(str(folder)) == load_model(str(cached)).fingerprint
    flip_a_weight(folder)
    (cached / "model.safetensors").resolve().write_bytes((folder / "model.safetensors").read_bytes())
    assert fingerprint_of(str(cached)) != fingerprint_of(str(folder))  # nobody reads them to know which they are
    (tmp_path / "hub/models--org--tiny").rename(tmp_path / "hub/copied")
    elsewhere = tmp_path / "hub/copied/snapshots" / cached.name
    assert fingerprint_of(str(elsewhere)) == fingerprint_of(str(folder))  # a name proves nothing elsewhere


def test_what_a_pass_takes_beside_the_weights_follows_tokens_dtype_and_the_widest_block(
    model_folders: dict[str, Path], folder: Path
) -> None:
    def of(folder: Path) -> int:
        return pass_bytes(str(folder), 100, torch.float32)

    for one in model_folders.values():
        assert of(one) == 10 * pass_bytes(str(one), 10, torch.float32) == 2 * pass_bytes(str(one), 100, torch.bfloat16)
    hidden = load_model(str(folder)).width
    edit_json("config.json", intermediate_size=1000)(folder)
    assert of(folder) == 100 * (10 * hidden + 4 * 1000) * 4


def test_weights_are_read_straight_onto_an_accelerator(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = AutoModelForCausalLM.from_pretrained, list[object]()

    def watched(*args: object, **named: object) -> object:
        asked.append(named["device_map"])
        return real(*args, **named)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    assert load_model(str(folder), device=torch.device("meta")).model.device == torch.device("meta")
    load_model(str(folder), device=torch.device("cpu"))
    assert asked == [{"": torch.device("meta")}, None]


def test_dtype_and_library_version_are_no_identity(folder: Path) -> None:
    before = fingerprint_of(str(folder))
    edit_json("config.json", dtype="bfloat16", transformers_version="9.9", _name_or_path="/x")(folder)
    assert fingerprint_of(str(folder)) == before


def test_two_models_of_one_shape_differ_by_their_weights(tmp_path: Path) -> None:
    first, second = (fingerprint_of(str(write_model(tmp_path / str(s), "llama", seed=s))) for s in (0, 1))
    assert (first.config, first.tokenizer) == (second.config, second.tokenizer) and first.weights != second.weights


def test_a_random_model_has_the_shape_and_tokenizer_but_never_the_weights(model_folders: dict[str, Path]) -> None:
    name = str(model_folders["neox"])
    trained, first = load_model(name), load_model(f"random:{name}")
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = load_model(f"random:{name}")
    assert torch.equal(torch.get_rng_state(), state)  # loading draws from a generator of its own
    assert first.fingerprint == second.fingerprint == fingerprint_of(f"random:{name}")
    assert first.fingerprint.weights != trained.fingerprint.weights
    assert (first.fingerprint.config, first.fingerprint.tokenizer) == (
        trained.fingerprint.config,
        trained.fingerprint.tokenizer,
    )
    for a, b, c in zip(first.model.parameters(), second.model.parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(a, b) and a.shape == c.shape
    assert not torch.equal(first.embed(torch.tensor([5])), trained.embed(torch.tensor([5])))


@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_bytes_are_those_loaded(family: str, lms: dict[str, FrozenLM]) -> None:
    lm = lms[family]
    held = sum(p.nbytes for p in {p.data_ptr(): p for p in lm.model.parameters()}.values())
    assert predicted_bytes(lm.name, torch.float32) == held
    assert predicted_bytes(f"random:{lm.name}", torch.float16) == held // 2


def test_pickled_weights_are_not_read(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for look in (fingerprint_of, load_model):
        with pytest.raises(ModelUnavailable, match=r"no model\.safetensors .* pickled"):
            look(str(folder))


@pytest.mark.parametrize("name", ["builtin:nobody", "nobody/there-is-no-such-model", "not a name!", "../gone"])
def test_an_unknown_model_is_one_line(name: str) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        load_model(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"holds no config\.json"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("damage", ["weights", "config", "tokenizer"])
def test_damaged_files_are_one_line(folder: Path, damage: str) -> None:
    name = {"weights": "model.safetensors", "config": "config.json", "tokenizer": "tokenizer.json"}[damage]
    (folder / name).write_bytes((folder / name).read_bytes()[:50])
    with pytest.raises(ModelUnavailable) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [4, 50])
def test_predicting_from_damaged_weights_is_one_line(folder: Path, size: int) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:size])
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors"):
        predicted_bytes(str(folder), torch.float32)


def test_remote_code_is_never_run(folder: Path) -> None:
    ran = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\n")
    edit_json("config.json", model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"})(
        folder
    )
    with pytest.raises(ModelUnavailable):
        load_model(str(folder))
    assert not ran.exists()


@pytest.mark.parametrize(
    "change",
    [
        edit_json("tokenizer_config.json", bos_token=None),
        lambda folder: (folder / "merges.txt").write_text("a b"),
        lambda folder: (folder / "spiece.model").write_bytes(b"pieces"),
    ],
    ids=["no bos", "merges", "sentencepiece"],
)
def test_whatever_decides_the_tokens_is_part_of_the_identity(folder: Path, change: Callable[[Path], None]) -> None:
    before = fingerprint_of(str(folder))
    change(folder)
    after = fingerprint_of(str(folder))
    assert before.tokenizer != after.tokenizer and before.weights == after.weights


def test_weights_the_library_would_invent_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelUnavailable, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(folder))


def test_a_models_own_generation_defaults_change_no_answer(folder: Path) -> None:
    plain = load_model(str(folder))
    odd = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 9, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(odd))
    row = compose(plain, layout_for(plain, "{latent}"), "Mara Mara Mara", latent=None)
    params = [SamplingParams(12)]
    assert generate(load_model(str(folder)), [row], None, params)[0] == generate(plain, [row], None, params)[0]


def test_special_tokens_written_in_a_text_are_plain_text(lm: FrozenLM) -> None:
    text = "Mara </s> sings <pad><s>."
    ids = text_ids(lm, text)
    assert not set(ids) & {0, 1, 2} and lm.tokenizer.decode(ids) == text


def test_the_embedding_scale_is_what_the_model_reads_not_what_its_weights_say(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    shape = {"head_dim": 8, "num_key_value_heads": 2, "intermediate_size": 48}
    Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=len(tokenizer), **SHAPE, **shape)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = load_model(str(tmp_path))
    read = lm.embed(torch.arange(len(tokenizer)))
    assert lm.embedding_rms() == pytest.approx(float(read.pow(2).mean(dim=1).sqrt().mean()), rel=1e-4)
    assert lm.embedding_rms() > 4 * float(lm.model.get_input_embeddings().weight.pow(2).mean().sqrt())


def test_weights_stored_twice_are_counted_and_known_once(folder: Path) -> None:
    before = fingerprint_of(str(folder)), predicted_bytes(str(folder), torch.float32)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert (fingerprint_of(str(folder)), predicted_bytes(str(folder), torch.float32)) == before


def test_sharded_weights_are_read_through_their_index(folder: Path, lms: dict[str, FrozenLM]) -> None:
    lms["llama"].model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and load_model(str(folder)).fingerprint == fingerprint_of(str(folder))
    assert predicted_bytes(str(folder), torch.float32) == sum(p.nbytes for p in lms["llama"].model.parameters())
    shards[0].unlink()
    with pytest.raises(ModelUnavailable, match=f"{shards[0].name} is missing"):
        fingerprint_of(str(folder))


@pytest.mark.parametrize(
    "change",
    [
        edit_json("config.json", hidden_size=64),
        edit_json("config.json", num_attention_heads=0),
        edit_json("config.json", num_hidden_layers="three"),
        edit_json("tokenizer.json", model={"type": "BPE"}),
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
        lambda folder: (folder / "generation_config.json").write_text("[1]"),
    ],
    ids=["width", "no heads", "type", "tokenizer", "tokenizer list", "generation list"],
)
def test_files_that_contradict_each_other_are_one_line(folder: Path, change: Callable[[Path], None]) -> None:
    change(folder)
    with pytest.raises(ModelUnavailable) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_an_untrained_model_is_the_same_one_in_every_dtype(folder: Path) -> None:
    single, half = (load_model(f"random:{folder}", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for a, b in zip(single.model.parameters(), half.model.parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b)


def test_a_family_that_embeds_narrower_than_it_thinks_has_two_widths(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = load_model(str(tmp_path))
    assert (lm.width, lm.state_width(0), lm.state_width(1)) == (16, 16, 32)
    ids, mask = pad_sources(lm, [tokenize_source(lm, "Mara", lm.source_layout, max_tokens=9)])
    assert hidden_states(lm, ids, mask, (1,)).shape[-1] == lm.state_width(1)


def test_passes_of_two_threads_each_stop_at_their_own_layer(lms: dict[str, FrozenLM]) -> None:
    lm = lms["llama"]
    ids, mask = pad_sources(lm, [tokenize_source(lm, "Mara lives in Rome.", lm.source_layout, max_tokens=64)])
    alone = {layer: hidden_states(lm, ids, mask, [layer]) for layer in (1, 3)}
    with ThreadPoolExecutor(2) as pool:
        for layer, states in pool.map(lambda n: (n, hidden_states(lm, ids, mask, [n])), [1, 3] * 100):
            assert torch.equal(states, alone[layer])


def test_a_whole_pass_of_another_thread_does_not_stop_at_a_layer(lms: dict[str, FrozenLM]) -> None:
    lm = lms["llama"]
    ids, mask = pad_sources(lm, [tokenize_source(lm, "Mara lives in Rome.", lm.source_layout, max_tokens=64)])
    with torch.inference_mode(), ThreadPoolExecutor(1) as pool:
        alone = lm.model(input_ids=ids).logits
        reading = pool.submit(lambda: [hidden_states(lm, ids, mask, [1]) for _ in range(200)])
        while not reading.done():
            assert torch.equal(lm.model(input_ids=ids).logits, alone)
        reading.result()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A cache of the Hub with two revisions of ``org/tiny``, as the library keeps them: commit by name."""
    commits = {"v1": "1" * 40, "main": "2" * 40}
    home = tmp_path / "models--org--tiny"
    for seed, (name, commit) in enumerate(commits.items()):
        write_model(home / "snapshots" / commit, "llama", seed=seed)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return commits


def test_a_hub_name_can_say_which_revision(hub: dict[str, str]) -> None:
    prints = {at: fingerprint_of(f"org/tiny{at}") for at in ("", "@main", "@v1", f"@{hub['v1']}")}
    assert prints[""] == prints["@main"] != prints["@v1"] == prints[f"@{hub['v1']}"]
    lm = load_model("org/tiny@v1")
    assert lm.fingerprint == prints["@v1"] and lm.ref.name == "org/tiny@v1"  # as a checkpoint keeps it
    assert load_model("random:org/tiny@v1").name == "random:org/tiny@v1"
    with pytest.raises(ModelUnavailable, match="'org/tiny@v9' is neither"):
        fingerprint_of("org/tiny@v9")
