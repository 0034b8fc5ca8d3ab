"""The table tensor -> encoding: as short as it can be, and what it says of each tensor."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlayer.checkpoint.encoded import EncodingTable

MATRICES = (
    *("embed.weight", "lm_head.weight"),
    *(f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(12)),
    *(
        f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
        for layer in range(3)
        for expert in range(12)
        for name in ("up_proj", "down_proj")
    ),
)
SOME = st.sampled_from([None, "mxfp4", "int8"])


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_it_says_of_every_tensor_what_it_was_made_of(data):
    """Encodings drawn for all, for each layer, or for each tensor: what differs is exact."""
    per_layer = {name.split(".")[2]: data.draw(SOME) for name in MATRICES[2:14]}
    made = {name: per_layer.get(name.split(".")[-2], per_layer["0"]) for name in MATRICES}
    made |= {name: data.draw(SOME) for name in data.draw(st.lists(st.sampled_from(MATRICES)))}
    table = EncodingTable.of(made)
    assert {name: table.of_tensor(name) for name in MATRICES} == made
    assert EncodingTable.from_dict(table.as_dict()) == table
    assert bool(table) == any(made.values())
    assert set(table.encodings) == set(made.values()) - {None}


def test_one_row_is_for_all_that_are_alike_and_one_for_each_that_differs():
    made = dict.fromkeys(MATRICES[2:], "mxfp4") | dict.fromkeys(MATRICES[:2])
    experts = "model.layers.*.mlp.experts.*."
    usual = {
        f"{experts}down_proj.weight": "mxfp4",
        f"{experts}up_proj.weight": "mxfp4",
        "model.layers.*.self_attn.q_proj.weight": "mxfp4",
    }
    assert EncodingTable.of(made).as_dict() == usual
    second = [name for name in MATRICES if ".1.mlp.experts" in name and "up_proj" in name]
    one = "model.layers.2.mlp.experts.7.down_proj.weight"
    differing = made | dict.fromkeys(second) | {one: "int8"}
    assert EncodingTable.of(differing).as_dict() == usual | {
        "model.layers.1.mlp.experts.*.up_proj.weight": None,
        one: "int8",
    }


def test_an_encoding_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="encoding 'int3'"):
        EncodingTable.from_dict({"lm_head.weight": "int3"})
