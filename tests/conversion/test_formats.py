"""Every format is recognised by what it holds, leads to the same weights, and comes back bit for bit."""

import json
import shutil
from dataclasses import replace

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from paddle_dit.conversion import load_model, read_weights
from paddle_dit.conversion.architecture import POSITION_TOLERANCE, Hints
from paddle_dit.conversion.formats import DIFFUSERS, FACEBOOK, OWN, PADDLEMIX, PPDIFFUSERS
from paddle_dit.conversion.keymaps import foreign_shapes, split
from paddle_dit.conversion.outputs import write_model
from paddle_dit.conversion.ppdiffusers_pipeline import stock_config
from paddle_dit.conversion.sources import open_model
from paddle_dit.errors import CheckpointError, ConversionError
from paddle_dit.models.refit import parameter_shapes
from paddle_dit.positions import sincos_position_table

from ..conftest import GOLDEN
from .pytorch_files import write_pt, write_training_checkpoint

HEADS = {"num_heads": 3}


def foreign(tensors, config, form, positions=True):
    """Return a model's tensors as a format has them."""
    arrays = dict(split(form.rules(config), tensors))
    if positions and form in (FACEBOOK, PADDLEMIX):
        arrays["pos_embed"] = sincos_position_table(config.hidden_size, config.grid)[None]
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def same(found, tensors):
    return found.keys() == tensors.keys() and all(
        np.array_equal(found[name], tensors[name]) and found[name].dtype == np.float32 for name in tensors
    )


def as_facebook(folder, tensors, config):
    return write_pt(folder / "weights.pt", foreign(tensors, config, FACEBOOK)), FACEBOOK


def as_misnamed(folder, tensors, config):
    save_file(foreign(tensors, config, FACEBOOK), folder / "weights.bin")
    return folder / "weights.bin", FACEBOOK


def as_parallel(folder, tensors, config):
    weights = foreign(tensors, config, FACEBOOK)
    return write_pt(
        folder / "weights.ckpt", {f"_orig_mod.module.{key}": value for key, value in weights.items()}
    ), FACEBOOK


def as_lone_file(folder, tensors, config):
    write_pt(folder / "0050000.pt", foreign(tensors, config, FACEBOOK))
    (folder / "log.txt").write_text("training")
    return folder, FACEBOOK


def as_paddlemix(folder, tensors, config):
    weights = {f"transformer.{key}": value for key, value in foreign(tensors, config, PADDLEMIX).items()}
    wrong = {key: value + np.float32("pos_embed" not in key) for key, value in weights.items()}
    paddle.save({**wrong, "vae.encoder.conv_in.weight": np.zeros(2, np.float32)}, str(folder / "model_state.pdparams"))
    average = {key: paddle.to_tensor(value) for key, value in weights.items()}
    meta = {"num_updates": 3, "decay": 0.99, "param_2_rank": {"x": 0}}
    paddle.save({"data": average, "meta": meta}, str(folder / "ema_state.pdparams"))
    paddle.save({"x": 1}, str(folder / "optimizer.pdopt"))
    return folder, PADDLEMIX


def as_litema(folder, tensors, config):
    weights = foreign(tensors, config, PADDLEMIX)
    wrong = {f"transformer.{key}": value + np.float32(key != "pos_embed") for key, value in weights.items()}
    average = {f"model_ema.{key.replace('.', '')}": value for key, value in weights.items()}
    paddle.save({**wrong, **average}, str(folder / "model_state.pdparams"))
    return folder / "model_state.pdparams", PADDLEMIX


def as_notrainer(folder, tensors, config):
    weights = foreign(tensors, config, PADDLEMIX)
    wrong = {key: value + np.float32(key != "pos_embed") for key, value in weights.items()}
    paddle.save({"model": wrong, "ema": weights, "opt": {}, "args": {}}, str(folder / "0001000.pdparams"))
    return folder / "0001000.pdparams", PADDLEMIX


def as_diffusers(folder, tensors, config, form=DIFFUSERS, name="diffusion_pytorch_model.safetensors"):
    weights = foreign(tensors, replace(config, frequency_shift=1), form)
    stock = {**stock_config(config), "_class_name": "Transformer2DModel", "num_embeds_ada_norm": 1000}
    (folder / "config.json").write_text(json.dumps(stock))
    if name.endswith(".safetensors"):
        save_file(weights, folder / name)
    elif name.endswith(".bin"):
        write_pt(folder / name, weights)
    else:
        paddle.save(weights, str(folder / name))
    return folder, form


def as_diffusers_bin(folder, tensors, config):
    return as_diffusers(folder, tensors, config, name="diffusion_pytorch_model.bin")


def as_both_of_diffusers(folder, tensors, config):
    as_diffusers(
        folder, {name: array + 1 for name, array in tensors.items()}, config, name="diffusion_pytorch_model.bin"
    )
    return as_diffusers(folder, tensors, config)


def as_shards(folder, tensors, config):
    as_diffusers(folder, tensors, config)
    whole = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(whole)
    whole.unlink()
    placed = {}
    for number, part in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), 1):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        placed |= dict.fromkeys(part, file)
    (folder / f"{whole.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder, DIFFUSERS


def as_pipeline(folder, tensors, config):
    (folder / "transformer").mkdir()
    as_diffusers(folder / "transformer", tensors, config)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "id2label": {"7": "cock"}}))
    return folder, DIFFUSERS


def as_ppdiffusers(folder, tensors, config):
    return as_diffusers(folder, tensors, config, PPDIFFUSERS, "diffusion_paddle_model.safetensors")


def as_pdparams(folder, tensors, config):
    return as_diffusers(folder, tensors, config, PPDIFFUSERS, "model_state.pdparams")


def as_ours(folder, tensors, config):
    from paddle_dit.config import ModelInfo

    write_model(tensors, ModelInfo(config), folder / "made", "paddle_dit")
    return folder / "made", OWN


PLACES = [
    *(as_facebook, as_misnamed, as_parallel, as_lone_file, as_paddlemix, as_litema, as_notrainer, as_diffusers),
    *(as_diffusers_bin, as_both_of_diffusers, as_shards, as_pipeline, as_ppdiffusers, as_pdparams, as_ours),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_every_format_is_recognised_and_gives_the_same_weights(tiny, tmp_path, place):
    tensors, info = tiny(num_classes=1000)
    path, form = place(tmp_path, tensors, info.config)
    hints = {} if form in (DIFFUSERS, PPDIFFUSERS, OWN) else HEADS
    found, described = read_weights(path, **hints)
    assert same(found, tensors)
    assert open_model(path, hints=Hints(**hints)).format is form
    shift = info.config.frequency_shift if form is OWN else form.frequency_shift
    assert described.config == replace(info.config, frequency_shift=shift)
    if place is as_pipeline:
        assert described.label_names == {7: "cock"}


@pytest.mark.parametrize("target", ["paddle_dit", "facebook", "diffusers"])
@pytest.mark.parametrize("fields", [{}, {"patch_size": 4, "learn_sigma": False}, {"num_classes": 3, "mlp_ratio": 4.0}])
def test_there_and_back_is_bit_exact(tiny, tmp_path, target, fields):
    tensors, info = tiny(frequency_shift=0, label_names={0: "zero"}, **fields)
    output = tmp_path / ("out.safetensors" if target == "facebook" else "out")
    write_model(tensors, info, output, target)
    found, described = read_weights(output, **({} if target == "diffusers" else HEADS))
    assert same(found, tensors)
    assert described == (replace(info, label_names=None) if target == "facebook" else info)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


@pytest.mark.parametrize("fields", [{}, {"num_classes": 0}, {"class_dropout_prob": 0.0, "learn_sigma": False}])
def test_our_shapes_are_those_of_the_model(tiny, fields):
    tensors, info = tiny(**fields)
    assert parameter_shapes(info.config) == {name: array.shape for name, array in tensors.items()}
    for form in (FACEBOOK, PADDLEMIX, DIFFUSERS, PPDIFFUSERS, OWN):
        announced = foreign_shapes(form.rules(info.config), info.config)
        assert announced == {name: array.shape for name, array in split(form.rules(info.config), tensors)}
        assert sum(map(np.prod, announced.values())) >= sum(array.size for array in tensors.values())


def test_raw_weights_on_request(tiny, tmp_path):
    tensors, info = tiny()
    right = foreign(tensors, info.config, FACEBOOK)
    raw = {name: array + np.float32(name != "pos_embed") for name, array in right.items()}
    write_training_checkpoint(tmp_path / "both.pt", model=raw, ema=right)
    write_training_checkpoint(tmp_path / "raw.pt", model=raw)
    for name, change in (("ema", 0), ("model", 1)):
        found, _ = read_weights(tmp_path / "both.pt", name, **HEADS)
        assert same(found, {key: array + np.float32(change) for key, array in tensors.items()})
    with pytest.raises(CheckpointError, match=r"raw.pt holds no ema weights; ask for --weights model"):
        read_weights(tmp_path / "raw.pt", **HEADS)
    as_paddlemix(tmp_path, tensors, info.config)
    trained, _ = read_weights(tmp_path / "model_state.pdparams", "model", **HEADS)
    assert same(trained, {key: array + np.float32(1) for key, array in tensors.items()})
    with pytest.raises(CheckpointError, match=r"model_state.pdparams holds no ema weights; ask for --weights model"):
        read_weights(tmp_path / "model_state.pdparams", **HEADS)
    with pytest.raises(CheckpointError, match=r"ema_state.pdparams holds no model weights; ask for --weights ema"):
        read_weights(tmp_path / "ema_state.pdparams", "model", **HEADS)


def test_the_golden_weights_compute_the_papers_outputs_from_a_file(tmp_path):
    with np.load(GOLDEN / "dit_tiny.npz") as golden:
        weights = {key[8:]: golden[key] for key in golden.files if key.startswith("weights/")}
        given, wanted = [golden[f"forward/{name}"] for name in "xty"], golden["forward/out"]
    write_training_checkpoint(tmp_path / "0400000.pt", model=weights, ema=weights, args={"num_classes": 10})
    model, info = load_model(tmp_path / "0400000.pt", num_heads=4)
    assert (info.config.frequency_shift, info.config.sample_size) == (0, 8)
    with paddle.no_grad():
        out = model(*map(paddle.to_tensor, given)).numpy()
    assert np.abs(out - wanted).max() <= 1e-5
    write_model(
        dict(open_model(tmp_path / "0400000.pt", hints=Hints(4)).tensors), info, tmp_path / "x.safetensors", "facebook"
    )
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[name], weights[name]) for name in weights)


def test_half_precision_is_widened_exactly(tiny, tmp_path):
    tensors, info = tiny()
    halves = {name: array.astype(np.float16) for name, array in foreign(tensors, info.config, FACEBOOK).items()}
    source = open_model(write_pt(tmp_path / "half.pt", halves), hints=Hints(3))
    assert any("position table is the fixed one, rounded" in line for line in source.notes)
    name = "blocks.1.attn.qkv.weight"
    assert np.array_equal(source.tensors[name], halves[name].T.astype(np.float32))


def test_an_average_moves_the_position_table_a_little_and_training_far(tiny, tmp_path):
    tensors, info = tiny()
    weights = foreign(tensors, info.config, FACEBOOK)
    fixed = weights["pos_embed"]
    weights["pos_embed"] = fixed + np.float32(2e-4)
    assert same(read_weights(write_pt(tmp_path / "a.pt", weights), **HEADS)[0], tensors)
    weights["pos_embed"] = fixed + np.float32(10 * POSITION_TOLERANCE)
    path = write_pt(tmp_path / "b.pt", weights)
    with pytest.raises(
        ConversionError, match=r"b.pt: its position table was trained \(up to 0.05 .*--drop-trained-pos"
    ):
        read_weights(path, **HEADS)
    assert same(read_weights(path, **HEADS, drop_trained_positions=True)[0], tensors)


def test_frequencies_on_request(tiny, tmp_path):
    tensors, info = tiny(num_classes=1000)
    for place in (as_facebook, as_diffusers):
        (tmp_path / place.__name__).mkdir()
        path, form = place(tmp_path / place.__name__, tensors, info.config)
        assert read_weights(path, **HEADS)[1].config.frequency_shift == form.frequency_shift
        other = 1 - form.frequency_shift
        assert read_weights(path, **HEADS, frequency_shift=other)[1].config.frequency_shift == other


def test_each_programs_own_frequencies(tiny, tmp_path):
    tensors, info = tiny(frequency_shift=0)
    shifts = {form.name: form.frequency_shift for form in (FACEBOOK, PADDLEMIX, DIFFUSERS, PPDIFFUSERS)}
    assert shifts == {"facebook/DiT": 0, "PaddleMIX DiT": 0, "diffusers DiT": 1, "ppdiffusers DiT": 1}
    write_model(tensors, info, tmp_path / "out", "diffusers")  # which says in paddle_dit.json what we know of it
    assert read_weights(tmp_path / "out")[1] == info
    assert read_weights(tmp_path / "out", frequency_shift=1)[1].config == replace(info.config, frequency_shift=1)
    with pytest.raises(ConversionError, match="says num_heads 3, not 4; leave it out"):
        read_weights(tmp_path / "out", num_heads=4)


def test_what_stands_beside_a_trainers_transformer_is_set_aside_or_refused(tiny, tmp_path):
    tensors, info = tiny()
    weights = {f"transformer.{key}": value for key, value in foreign(tensors, info.config, PADDLEMIX).items()}
    path = tmp_path / "model_state.pdparams"
    paddle.save({**weights, "vae.decoder.x": np.zeros(2, np.float32)}, str(path))
    source = open_model(path, "model", Hints(3))
    assert "set aside beside the model: 1, such as 'vae.decoder.x'" in source.notes
    paddle.save({**weights, "adapter.x": np.zeros(2, np.float32)}, str(path))
    with pytest.raises(ConversionError, match=r"unexpected: adapter.x \(1\)"):
        open_model(path, "model", Hints(3))


def test_heads_come_from_a_preset_a_configuration_or_the_user_and_it_is_said(tiny, tmp_path):
    tensors, info = tiny(hidden_size=384, num_heads=6, depth=1)
    source = open_model(write_pt(tmp_path / "a.pt", foreign(tensors, info.config, FACEBOOK)))
    assert source.info.config.num_heads == 6
    assert "6 heads: those of the presets of width 384; no tensor shows them" in source.notes
    narrow, info = tiny()
    path = write_pt(tmp_path / "b.pt", foreign(narrow, info.config, FACEBOOK))
    with pytest.raises(ConversionError, match=r"b.pt: no tensor shows the number of heads, .* give --num-heads"):
        read_weights(path)
    assert "3 heads: as you say" in open_model(path, hints=Hints(3)).notes
    with pytest.raises(ConversionError, match="multiple of num_heads 5"):
        read_weights(path, num_heads=5)


def test_a_file_without_positions_needs_the_sample_size(tiny, tmp_path):
    tensors, info = tiny()
    path = write_pt(tmp_path / "a.pt", foreign(tensors, info.config, FACEBOOK, positions=False))
    with pytest.raises(ConversionError, match="no position table to tell its sample_size by; give --sample-size"):
        read_weights(path, **HEADS)
    assert read_weights(path, **HEADS, sample_size=8)[1].config.sample_size == 8
    write_training_checkpoint(tmp_path / "b.pt", ema=foreign(tensors, info.config, FACEBOOK), args={"image_size": 256})
    with pytest.raises(ConversionError, match=r"\('args'\) in b.pt contradicts .* sample_size is 32 there, 8 in the"):
        read_weights(tmp_path / "b.pt", **HEADS)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_layers": 3}, "depth is 3 there, 2 in the tensors"),
        ({"attention_head_dim": 8}, "hidden_size is 24 there, 48 in the tensors"),
        ({"patch_size": 4}, "patch_size is 4 there, 2 in the tensors"),
        ({"out_channels": 4}, "learn_sigma is False there, True in the tensors"),
        ({"num_embeds_ada_norm": 999}, "num_classes is 999 there, 1000 in the tensors"),
        ({"num_layers": "two"}, "depth is 'two', not a whole number"),
        ({"norm_type": "layer_norm"}, "norm_type is 'layer_norm'"),
        ({"sample_size": 7}, "sample_size 7 must be a positive multiple of patch_size 2"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(tiny, tmp_path, change, told):
    tensors, info = tiny(num_classes=1000)
    as_diffusers(tmp_path, tensors, info.config)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConversionError, match=told):
        read_weights(tmp_path)


def test_a_label_table_without_a_null_class_is_known_by_the_configuration(tiny, tmp_path):
    tensors, info = tiny(num_classes=11, class_dropout_prob=0.0)
    right = foreign(tensors, info.config, FACEBOOK)
    write_training_checkpoint(tmp_path / "a.pt", ema=right, args={"num_classes": 11})
    config = read_weights(tmp_path / "a.pt", **HEADS)[1].config
    assert (config.num_classes, config.has_null_class) == (11, False)
    source = open_model(write_pt(tmp_path / "b.pt", right), hints=Hints(3))
    assert source.info.config.num_classes == 10
    assert "10 classes and the null class: the label table has 11 rows" in source.notes


def test_a_published_folder_of_diffusers_has_another_epsilon_and_it_is_said(tiny, tmp_path):
    tensors, info = tiny(num_classes=1000)
    as_diffusers(tmp_path, tensors, info.config)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "norm_eps": 1e-5}))
    assert "the norm before an MLP has epsilon 1e-05 there and 1e-06 here" in open_model(tmp_path).notes


def test_two_kinds_of_weights_in_a_folder_are_refused(tiny, tmp_path):
    tensors, info = tiny(num_classes=1000)
    as_diffusers(tmp_path, tensors, info.config)
    shutil.copy(tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "diffusion_paddle_model.safetensors")
    with pytest.raises(ConversionError, match=r"holds 2 files of weights \(diffusion_paddle_model.*name the one"):
        read_weights(tmp_path)
