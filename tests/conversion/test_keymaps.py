"""The name tables cover a model completely, in both directions, and refuse anything else."""

import numpy as np
import pytest

from paddle_dit.conversion.keymaps import from_ppdiffusers, ppdiffusers_rules, to_ppdiffusers
from paddle_dit.errors import ConversionError


@pytest.mark.parametrize("num_classes", [0, 10, 1000, 1003])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_there_and_back_is_bit_exact(tiny, num_classes, dropout):
    tensors, info = tiny(num_classes=num_classes, class_dropout_prob=dropout, learn_sigma=False)
    back = from_ppdiffusers(to_ppdiffusers(tensors, info.config), info.config)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


def test_row_1000_and_all_between_are_the_null_class(tiny):
    tensors, info = tiny()
    stock = to_ppdiffusers(tensors, info.config)
    for index in range(info.config.depth):
        table = stock[f"transformer_blocks.{index}.norm1.emb.class_embedder.embedding_table.weight"]
        assert table.shape == (1001, 48)
        assert np.array_equal(table[:11], tensors["y_embedder.embedding_table.weight"])
        assert (table[10:] == table[10]).all()


def test_layouts(tiny):
    tensors, info = tiny(patch_size=4)
    stock = to_ppdiffusers(tensors, info.config)
    kernel, linear = stock["pos_embed.proj.weight"], tensors["x_embedder.proj.weight"]
    assert kernel.shape == (48, 4, 4, 4)
    assert kernel[7, 2, 1, 3] == linear[2 * 16 + 1 * 4 + 3, 7]
    qkv = tensors["blocks.1.attn.qkv.weight"]
    assert np.array_equal(stock["transformer_blocks.1.attn1.to_v.weight"], qkv[:, 96:])
    assert np.array_equal(stock["transformer_blocks.1.attn1.to_k.bias"], tensors["blocks.1.attn.qkv.bias"][48:96])


def test_each_tensor_of_the_stock_class_is_named_once(tiny):
    from ppdiffusers import Transformer2DModel

    from paddle_dit.conversion.ppdiffusers_pipeline import stock_config

    tensors, info = tiny()
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in Transformer2DModel(**stock_config(info.config)).state_dict().items()
    }
    assert {name: array.shape for name, array in to_ppdiffusers(tensors, info.config).items()} == expected
    named = [name for rule in ppdiffusers_rules(info.config) for name in rule.theirs]
    assert sorted(named) == sorted(expected)


def test_missing_and_foreign_names_are_listed(tiny):
    tensors, info = tiny()
    del tensors["blocks.1.mlp.fc1.bias"]
    tensors["unet.conv_in.weight"] = np.zeros(3, np.float32)
    with pytest.raises(ConversionError, match=r"missing: blocks.1.mlp.fc1.bias \(1\); unexpected: unet.conv_in.weight"):
        to_ppdiffusers(tensors, info.config)


def test_blocks_with_different_embedders_are_refused(tiny):
    tensors, info = tiny()
    stock = to_ppdiffusers(tensors, info.config)
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight"
    stock[name] = stock[name] + 1
    with pytest.raises(ConversionError, match="different timestep or label embedders"):
        from_ppdiffusers(stock, info.config)


def test_a_wrong_shape_is_refused(tiny):
    tensors, info = tiny()
    tensors["x_embedder.proj.weight"] = tensors["x_embedder.proj.weight"][:-1]
    with pytest.raises(ConversionError, match=r"'x_embedder.proj.weight' of shape \(15, 48\)"):
        to_ppdiffusers(tensors, info.config)
