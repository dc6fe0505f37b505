"""The tables of published names are those of the stored checkpoints, and every format loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.full_size import (
    BRIDGE,
    FORMATS,
    PUBLISHED,
    TABLES,
    Sizes,
    Transformer,
    disk_size,
    write_checkpoint,
)
from pizero.agent.weights import load_model, open_source

FIXTURES = Path(__file__).parents[2] / "data" / "fixtures"
SMALL = Sizes(
    vlm=Transformer(32, 2, 48, head_dim=8),
    expert=Transformer(16, 2, 24, head_dim=8),
    vision=Transformer(24, 2, 40, heads=4, head_dim=6),
    patches=4,
    vocabulary=300,
    state=6,
    action=5,
)
HEADS = {
    "vision.num_heads": 4,
    "joint.mixtures.vlm.num_heads": 8,
    "joint.mixtures.action.num_heads": 8,
}


def sizes_of(case: str) -> Sizes:
    dims = json.loads((FIXTURES / case / "case.json").read_text())["dims"]

    def transformer(d):
        head_dim = d.get("head_dim", d["width"] // d["num_heads"])
        return Transformer(d["width"], d["depth"], d["mlp_dim"], d["num_heads"], head_dim)

    return Sizes(
        vlm=transformer(dims["vlm"]),
        expert=transformer(dims["action_expert"]),
        vision=transformer(dims["vision"]),
        patch=dims["vision"]["patch_size"],
        patches=dims["vision"]["tokens_per_image"],
        vocabulary=dims["vocab_size"],
        state=dims.get("proprio_dim", dims["action_dim"]),
        action=dims["action_dim"],
    )


@pytest.mark.parametrize(
    ("case", "stored", "format", "kind"),
    [
        ("openpi_pi0", "weights.safetensors", "openpi", "pi0"),
        ("openpi_pi05", "weights.safetensors", "openpi", "pi05"),
        ("open_pi_zero", "weights.safetensors", "open_pi_zero", "pi0"),
        ("openpi_orbax", "checkpoint", "orbax", "pi0"),
    ],
)
def test_tables_are_those_of_stored_checkpoints(case, stored, format, kind):
    entries = open_source(FIXTURES / case / stored).entries
    expected = {name: entry.shape for name, entry in entries.items()}
    assert TABLES[format](sizes_of(case), kind) == expected


@pytest.mark.parametrize(
    ("format", "kind", "tensors", "parameters"),
    [
        ("openpi", "pi0", 777, 3_501_372_176),
        ("openpi", "pi05", 812, 3_616_757_520),
        ("giga", "pi0", 776, 3_238_048_528),
        ("giga", "pi05", 811, 3_353_433_872),
        ("transformers", "pi0", 777, 3_501_372_176),
        ("orbax", "pi0", 50, 3_238_048_528),
        ("orbax", "pi05", 51, 3_353_433_872),
        ("open_pi_zero", "pi0", 938, 3_238_100_727 + 311_464_960),  # proprio's are action's
    ],
)
def test_full_sizes_are_the_published_ones(format, kind, tensors, parameters):
    shapes = TABLES[format](BRIDGE if format == "open_pi_zero" else PUBLISHED, kind).values()
    assert sum(torch.Size(shape).numel() for shape in shapes) == parameters
    assert len(shapes) == tensors


def test_the_table_of_transformers_is_what_it_saves(tmp_path):
    from transformers import PI0Config, PI0ForConditionalGeneration

    vlm, expert, eyes = SMALL.vlm, SMALL.expert, SMALL.vision

    def language(sizes: Transformer) -> dict:
        return dict(
            hidden_size=sizes.width, intermediate_size=sizes.mlp, num_hidden_layers=sizes.depth,
            num_attention_heads=sizes.heads, num_key_value_heads=1, head_dim=sizes.head_dim,
            vocab_size=SMALL.vocabulary, model_type="gemma", pad_token_id=None,
        )  # fmt: skip

    vision = dict(
        hidden_size=eyes.width, intermediate_size=eyes.mlp, num_hidden_layers=eyes.depth,
        num_attention_heads=eyes.heads, patch_size=14, image_size=28, vision_use_head=False,
        model_type="siglip_vision_model",
    )  # fmt: skip
    config = PI0Config(
        vlm_config=dict(
            text_config=language(vlm), vision_config=vision, projection_dim=vlm.width,
            model_type="paligemma", image_token_id=SMALL.vocabulary,
        ),
        dit_config=language(expert), max_state_dim=6, max_action_dim=5,
    )  # fmt: skip
    PI0ForConditionalGeneration(config).save_pretrained(tmp_path)
    saved = {name: entry.shape for name, entry in open_source(tmp_path).entries.items()}
    assert TABLES["transformers"](SMALL, "pi0") == saved


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_loads(tmp_path, format, kind):
    if format in ("open_pi_zero", "transformers") and kind == "pi05":
        with pytest.raises(ValueError, match="pi0 only"):
            write_checkpoint(format, tmp_path / "new", kind=kind, sizes=SMALL)
        return
    path = write_checkpoint(format, tmp_path / "new", kind=kind, sizes=SMALL)
    loaded = load_model(path, overrides=HEADS)
    assert loaded.found.kind == kind
    assert loaded.model.action_dim == 5
    assert loaded.model.joint.mixtures["action"].blocks[0].kv_proj.weight.abs().max() < 0.2
    stored = sum(e.num_bytes for e in open_source(path).entries.values())
    assert disk_size(path) > 0.5 * stored
