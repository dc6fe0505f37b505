"""check_parity on weights as other projects keep them: JAX's trees, adapters, training folders,
copies in another precision, and a model of transformers saved by itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from make_case import DIMS, ROWS, ZERO, Made, expert, fast_case, flow_case
from safetensors.torch import save_file
from test_parity_variants import check
from test_transformers import IMAGE, hugging_face_pi0
from weights_files import orbax_folder

from pizero.agent.parity import check_case
from pizero.agent.weights import inspect

TOGETHER = {  # as many key heads as query heads: JAX keeps their projections in one
    name: expert(width, mlp, num_kv_heads=4)
    for name, width, mlp in (("vlm", 20, 28), ("action_expert", 14, 22))
}
SCALES = {"": 2.0, "_1": 0.5}


def on_disk(made: Made, folder: Path) -> Path:
    """The case with its weights in Orbax and nowhere else."""
    made.write(folder, weights=None)
    orbax_folder(folder / "checkpoint" / "params", made.weights)
    return folder


@pytest.mark.parametrize("heads", ["few", "all"])
@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_trees_of_jax(tmp_path, family, heads):
    dims = DIMS if heads == "few" else DIMS | TOGETHER
    made = flow_case(family, dims=dims, jax=True, gradients=True)
    assert any("qkv_einsum" in name for name in made.weights) == (heads == "all")
    check(on_disk(made, tmp_path))


@pytest.mark.parametrize("family", ["pi0", "pi05", "pi0_fast"])
def test_adapters_are_merged_and_have_gradients(tmp_path, family):
    """With a scale for each expert, which is attention's alone."""
    if family == "pi0_fast":
        made = fast_case(vlm=TOGETHER["vlm"], lora=2.0)
        made.extra["lora"] = {"rank": 3, "alpha": 6.0}
    else:
        made = flow_case(family, jax=True, lora=SCALES, gradients=True)
    adapters = [name for name in made.gradients if "lora_" in name]
    assert len(adapters) >= 8
    assert all(made.gradients[name].any() for name in adapters if "attn" not in name)
    check(on_disk(made, tmp_path / "right"))
    wrong = on_disk(made, tmp_path / "wrong")
    facts = json.loads((wrong / "case.json").read_text())
    for node in (facts, facts["dims"]["vlm"], facts["dims"].get("action_expert", {})):
        node.pop("lora", None)
    (wrong / "case.json").write_text(json.dumps(facts))
    assert not check_case(wrong).ok


def test_the_scale_of_adapters_is_asked_for_or_said():
    made = flow_case("pi0", jax=True, lora=SCALES)
    (note,) = made.found.notes[:1]
    assert note.startswith("LoRA's alpha / rank is not stored: 1 assumed")
    said = inspect(made.found.source, overrides={"lora.vlm.scale": 2.0, "horizon": 3})
    assert not said.notes


def test_gradients_may_go_by_openpis_names_beside_a_tree(tmp_path):
    """Those of a converted model: shapes of its own, an unread weight, an embedding by its name."""
    made = flow_case("pi0", jax=True, gradients=True)
    names = {
        "action_in_proj.weight": "action_in_proj/kernel",
        "action_time_mlp_in.weight": "action_time_mlp_in/kernel",
    }
    torch_names = {n: made.gradients[theirs].T for n, theirs in names.items()}
    layer = "paligemma_with_expert.gemma_expert.model.layers.1."
    queries = made.gradients["PaliGemma/llm/layers/attn/q_einsum_1/w"][1]
    torch_names[f"{layer}self_attn.q_proj.weight"] = queries.permute(0, 2, 1).flatten(0, 1)
    words = made.gradients["PaliGemma/llm/embedder/input_embedding"]
    root = "paligemma_with_expert.paligemma."
    torch_names[f"{root}model.language_model.embed_tokens.weight"] = words
    torch_names["paligemma_with_expert.gemma_expert.lm_head.weight"] = torch.zeros(40, 14)
    made.gradients = torch_names
    check(on_disk(made, tmp_path))
    made.gradients["action_in_proj.weight"] = -torch_names["action_in_proj.weight"]
    (failed,) = check_case(on_disk(made, tmp_path / "wrong")).sections[0].failed
    assert failed.name == "grad.action_in_proj.weight"


def test_what_lies_beside_weights_is_not_taken_for_weights(tmp_path):
    """The case folder is a training checkpoint of openpi, PyTorch's or JAX's, or of LeRobot."""
    state = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}
    made = flow_case("pi05")
    folder = made.write(tmp_path / "openpi", weights="model.safetensors")
    torch.save(state, folder / "optimizer.pt")
    torch.save({"global_step": 7, "config": {}}, folder / "metadata.pt")
    check(folder)
    folder = made.write(tmp_path / "lerobot", weights=None)
    (folder / "checkpoints" / "000500" / "pretrained_model").mkdir(parents=True)
    (folder / "checkpoints" / "000500" / "training_state").mkdir()
    inner = folder / "checkpoints" / "000500" / "pretrained_model"
    save_file({f"model.{n}": w for n, w in made.weights.items()}, inner / "model.safetensors")
    for path in (inner / "policy_preprocessor_step_2_normalizer_processor.safetensors",
                 inner.parent / "training_state" / "optimizer_state.safetensors"):  # fmt: skip
        save_file({"action.mean": torch.zeros(2)}, path)
    check(folder)
    made = flow_case("pi0", jax=True)
    folder = made.write(tmp_path / "jax", weights=None)
    orbax_folder(folder / "params", made.weights)
    orbax_folder(folder / "train_state", {"step": torch.tensor([3])})
    check(folder)


def test_weights_in_two_precisions(tmp_path):
    """Plain numbers are of one of the two; the other has to be its copy, and no other thing."""
    made = flow_case("pi0", gradients=True)
    low = {n: w.bfloat16() for n, w in made.weights.items()}
    numbers = flow_case("pi0", dtype=torch.bfloat16).io
    made.io["out.bf16.velocity"] = numbers["out.velocity"]
    made.extra["tolerance_rows"] = [{"match": "out.bf16.*", "atol": 0.1}, *ROWS]
    folder = made.write(tmp_path / "unrounded")
    save_file(low, folder / "weights_bf16.safetensors")
    first, copy = check_case(folder).sections
    assert first.ok
    assert not first.left_out
    assert copy.ok
    assert {row.name for row in copy.rows} >= {"weights", "out.bf16.velocity", "out.prefix_mask"}
    (line,) = copy.left_out
    assert "made with the weights rounded to bfloat16 from weights.safetensors: out." in line
    # one that differs in a single weight by more than rounding
    low["action_out_proj.bias"][0] *= 1.02
    save_file(low, folder / "weights_bf16.safetensors")
    assert [section.ok for section in check_case(folder).sections] == [True, False]
    # the numbers of the rounded weights, in float32 arithmetic
    low["action_out_proj.bias"] = made.weights["action_out_proj.bias"].bfloat16()
    rounded = flow_case("pi0", weights={n: w.float() for n, w in low.items()})
    folder = rounded.write(tmp_path / "rounded", weights=None)
    save_file(made.weights, folder / "weights.safetensors")
    save_file(low, folder / "weights_bf16.safetensors")
    first, copy = check_case(folder).sections
    assert first.ok
    assert "made with the weights before rounding to bfloat16," in first.left_out[0]
    assert copy.ok
    assert not copy.left_out


def test_makers_and_arithmetics_may_stand_together(tmp_path):
    made = flow_case("pi0")
    low = flow_case("pi0", dtype=torch.bfloat16).io["out.velocity"]
    made.io["out.jax.bf16.velocity"] = made.io["out.bf16.jax.velocity"] = low
    check(made.write(tmp_path))


def test_masks_may_be_integers(tmp_path):
    made = flow_case("open_pi_zero", dims=ZERO, cameras=("only",))
    made.io["in.attention_mask"] = made.io["in.attention_mask"].long()
    check(made.write(tmp_path / "open_pi_zero"))
    made = flow_case("pi0")
    made.io |= {n: x.int() for n, x in made.io.items() if n.startswith("in.") and "mask" in n}
    check(made.write(tmp_path / "pi0"))


def test_a_model_of_transformers_saved_by_itself(tmp_path):
    """Its folder, sharded, and its own numbers and gradients: nothing of ours made them."""
    theirs = hugging_face_pi0()
    config = theirs.config
    side, horizon, size = 8, config.chunk_size, config.max_action_dim
    actions, noise = torch.randn(2, horizon, size), torch.randn(2, horizon, size)
    time, words = torch.tensor([0.7, 0.09]), torch.randint(3, IMAGE, (2, 6))
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    pictures, state = torch.rand(2, 2, 3, side, side) * 2 - 1, torch.randn(2, size)
    places = torch.full((2, 2 * 4), IMAGE)
    inputs = dict(
        input_ids=torch.cat((places, words), dim=1),
        pixel_values=pictures,
        pixel_attention_mask=torch.ones(2, 2, dtype=torch.bool),
        attention_mask=torch.cat((torch.ones_like(places), mask.long()), dim=1),
        state=state,
    )
    made = theirs(**inputs, actions=actions, noise=noise, timestep=time.double())
    loss = made.loss.float()
    named = [(n, p) for n, p in theirs.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss.mean(), [p for _, p in named], allow_unused=True)
    sampled = theirs.sample_actions(**inputs, noise=noise, num_steps=4)
    io = {
        "in.image.front": pictures[:, 0], "in.image.wrist": pictures[:, 1],
        "in.tokens": words * mask, "in.token_mask": mask, "in.state": state,
        "in.actions": actions, "in.noise": noise, "in.time": time,
        "out.loss": loss, "out.loss_mean": loss.mean()[None],
        "out.velocity": made.logits.float(), "out.actions.steps4": sampled,
    }  # fmt: skip
    save_file({n: x.detach().clone() for n, x in io.items()}, tmp_path / "io.safetensors")
    given = {f"grad.{n}": g for (n, _), g in zip(named, grads, strict=True) if g is not None}
    save_file(given, tmp_path / "gradients.safetensors")
    facts = {"family": "pi0", "cameras": ["front", "wrist"]}
    (tmp_path / "case.json").write_text(json.dumps(facts))
    theirs.save_pretrained(tmp_path / "checkpoint", max_shard_size="20KB")
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 1
    report = check(tmp_path)
    assert len(report.sections[0].rows) == 4 + len(given)
