"""check_parity on cases of other sizes, families, arithmetics and kinds of weights, made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from make_case import ROWS, ZERO, Made, fast_case, flow_case
from safetensors.torch import load_file, save_file

from pizero.agent.parity import check_case


def check(folder: Path, *, sections: int = 1):
    """The report of a case that must pass, with everything compared."""
    report = check_case(folder)
    assert len(report.sections) == sections
    for section in report.sections:
        assert section.error is None
        assert section.failed == []
        assert section.unknown == []
        assert {row.name for row in section.rows} == {
            *report.case.outputs,
            *(f"grad.{name}" for name in report.case.gradients),
        }
    assert report.ok
    return report


@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_openpi_at_other_sizes(tmp_path, family):
    """Several key heads, odd sizes, cameras of any name, a gradient for every stored tensor."""
    made = flow_case(family, gradients=True, steps=(1, 3))
    assert len(made.gradients) == len(made.weights)
    check(made.write(tmp_path))


def test_open_pi_zero_at_other_sizes(tmp_path):
    """Two frames of state, a rotary base for each stream, another soft-cap, clip, sigma, period."""
    made = flow_case("open_pi_zero", dims=ZERO, cameras=("only",), gradients=True)
    clipped = made.io["out.actions.steps3"] != made.io["out.actions_unclipped.steps3"]
    assert clipped.any()
    check(made.write(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_softcap": None},
        {"final_action_clip_value": None},
        {"flow_sig_min": 0.0},
        {"cond_steps": 1},
    ],
    ids=lambda x: next(iter(x)),
)
def test_every_stated_convention_reaches_the_model(tmp_path, changes):
    made = flow_case("open_pi_zero", dims=ZERO | changes, cameras=("only",))
    check(made.write(tmp_path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_softcap", 50.0),
        ("final_action_clip_value", 1.0),
        ("flow_sig_min", 0.001),
        ("time_max_period", 10_000.0),
        ("vlm", {**ZERO["vlm"], "rope_theta": 10_000.0}),
        ("action_expert", {**ZERO["action_expert"], "rope_theta": 10_000.0}),
        ("vision", {"num_heads": 2}),
    ],
)
def test_a_wrong_convention_fails(tmp_path, name, value):
    made = flow_case("open_pi_zero", dims=ZERO, cameras=("only",))
    made.dims = {**made.dims, name: value}
    assert not check_case(made.write(tmp_path)).ok


def test_no_masks_at_all(tmp_path):
    made = flow_case("pi05", masks=False)
    made.extra["family"] = "pi0.5"
    check(made.write(tmp_path))


def test_all_cameras_present(tmp_path):
    made = flow_case("pi05", cameras=("z", "a", "m"))
    made.io |= {
        "in.image_mask.a": torch.ones(3, dtype=torch.bool),
        "in.image_mask.m": torch.ones(3, dtype=torch.bool),
    }
    made.extra["cameras"] = ["z", "a", "m"]
    with torch.no_grad():
        assert made.io["out.prefix_mask"].float().mean() < 1
    assert not check_case(made.write(tmp_path)).ok  # the mask that was there is gone


def test_cameras_come_in_the_order_that_the_case_gives(tmp_path):
    made = flow_case("pi0", cameras=("z", "a"))
    assert not check_case(made.write(tmp_path / "unsaid")).ok
    made.extra["conventions"] = {"images": "in.image.<camera>; cameras are ordered z, then a"}
    check(made.write(tmp_path / "in_words"))
    made.extra = {"io_file": {"tensors": {"in.image.z": {}, "in.image.a": {}}}}
    check(made.write(tmp_path / "in_the_file"))
    made.extra = {"cameras": ["z", "a"]}
    check(made.write(tmp_path / "listed"))
    made.extra = {"cameras": ["z", "b"]}
    report = check_case(made.write(tmp_path / "wrong"))
    assert "cameras are ['a', 'z'] in io.safetensors" in report.sections[0].rows[0].verdict.note


def test_training_checkpoints(tmp_path):
    """A .pt file of weights under "model" beside an optimizer's state, in bfloat16 and compiled."""
    rounded = {n: w.bfloat16() for n, w in flow_case("pi0").weights.items()}
    made = flow_case("pi0", weights={n: w.float() for n, w in rounded.items()})
    folder = made.write(tmp_path, weights=None)
    state = {"step": torch.tensor(3.0), "exp_avg": torch.ones(4)}
    torch.save(
        {
            "model": {f"_orig_mod.{n}": w for n, w in rounded.items()},
            "optimizer": {"state": {0: state}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
            "step": 12,
        },
        folder / "step12.pt",
    )
    check(folder)


def test_a_bfloat16_copy_in_float32_arithmetic(tmp_path):
    rounded = {n: w.bfloat16() for n, w in flow_case("open_pi_zero", dims=ZERO).weights.items()}
    weights = {n: w.float() for n, w in rounded.items() if ".proprio." not in n}
    made = flow_case("open_pi_zero", dims=ZERO, weights=weights, cameras=("only",), gradients=True)
    folder = made.write(tmp_path, weights=None)
    save_file(rounded, folder / "weights.safetensors")
    check(folder)


def test_bfloat16_arithmetic(tmp_path):
    """As the case's own arithmetic, and as outputs beside the float32 ones."""
    low = flow_case("pi05", dtype=torch.bfloat16)
    check(low.write(tmp_path / "own"))
    both = flow_case("pi05")
    both.io |= {
        n.replace("out.", "out.bf16."): x
        for n, x in low.io.items()
        if n in ("out.loss", "out.velocity", "out.actions.steps3", "out.cache_k.1")
    }
    assert not torch.equal(both.io["out.loss"], both.io["out.bf16.loss"])
    check(both.write(tmp_path / "beside"))


def test_bfloat16_numbers_may_be_those_of_another_order_of_rounding(tmp_path):
    """One whole run must be within the row: a number beside all of them is missed."""
    high = flow_case("pi0")
    made = flow_case("pi0")
    made.extra["tolerance_rows"] = [{"match": "out.*", "atol": 1e-7, "rtol": 0.0}]
    made.io = {n: x for n, x in made.io.items() if n.startswith("in.")}
    made.io["out.bf16.velocity"] = high.io["out.velocity"]
    (row,) = check_case(made.write(tmp_path / "unrounded")).sections[0].rows
    assert row.verdict.ok
    assert row.verdict.note.startswith("in float32; in our own bfloat16 order")
    made.io["out.bf16.velocity"] = high.io["out.velocity"] + 1e-4
    assert not check_case(made.write(tmp_path / "beside")).ok


def test_every_set_of_weights_is_checked(tmp_path):
    """Shards, folders and files in one case, each in a section of its own; gradients too."""
    made = flow_case("pi0", gradients=True)
    folder = made.write(tmp_path)
    (folder / "export" / "30000").mkdir(parents=True)
    save_file(made.weights, folder / "export" / "30000" / "model.safetensors")
    (folder / "assets").mkdir()
    (folder / "assets" / "norm_stats.json").write_text("{}")
    names = sorted(made.weights)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({n: made.weights[n] for n in part}, folder / file)
    index = {"weight_map": {n: file for file, part in shards.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    report = check(folder, sections=3)
    assert [s.source.name for s in report.sections] == [
        "weights.safetensors", "model.safetensors.index.json", "30000",
    ]  # fmt: skip
    save_file(made.weights | _nudged(made), folder / "export" / "30000" / "model.safetensors")
    assert [s.ok for s in check_case(folder).sections] == [True, True, False]


def test_fast(tmp_path):
    """Loss, logits, greedy tokens and gradients in JAX's layout."""
    made = fast_case()
    check(made.write(tmp_path / "right"))
    made.io["out.decode.tokens"][0, 1] += 1
    report = check_case(made.write(tmp_path / "wrong"))
    assert [row.name for row in report.sections[0].failed] == ["out.decode.tokens"]


def _nudged(made: Made, part: str = "layers.0.self_attn.k_proj") -> dict[str, torch.Tensor]:
    name = next(n for n in made.weights if part in n and "gemma_expert" in n)
    return {name: made.weights[name] * 1.01}


def test_a_wrong_weight_fails(tmp_path):
    made = flow_case("pi0")
    made.weights |= _nudged(made)
    report = check_case(made.write(tmp_path))
    assert not report.ok
    assert {"out.velocity", "out.loss"} <= {row.name for row in report.sections[0].failed}
    assert "out.prefix_embs" not in {row.name for row in report.sections[0].failed}


def test_every_stored_number_counts(tmp_path):
    """Each tensor with one number moved by 1 % of its largest is out of tolerance, and alone."""
    made = flow_case("pi0")
    for name in [n for n in made.io if n.startswith("out.") and n != "out.prefix_mask"]:
        moved = made.io[name].contiguous().clone()
        moved.view(-1)[0] += 0.01 * moved.abs().max()
        made.io[f"out.pytorch.{name[4:]}"] = moved
    (section,) = check_case(made.write(tmp_path)).sections
    moved = {name for name in made.io if name.startswith("out.pytorch.")}
    assert len(moved) > 15
    assert {row.name for row in section.failed} == moved
    made.io = {n: x for n, x in made.io.items() if not n.startswith("out.pytorch.")}
    made.io["out.prefix_mask"] = made.io["out.prefix_mask"].logical_not()
    (failed,) = check_case(made.write(tmp_path)).sections[0].failed
    assert failed.name == "out.prefix_mask"


def test_a_wrong_gradient_fails(tmp_path):
    made = flow_case("pi0", gradients=True)
    name = "paligemma_with_expert.paligemma.model.language_model.layers.1.mlp.up_proj.weight"
    made.gradients[name] = made.gradients[name] * 1.001
    dead = "paligemma_with_expert.paligemma.model.language_model.norm.weight"
    made.gradients[dead] = torch.ones_like(made.gradients[dead])
    failed = {row.name for row in check_case(made.write(tmp_path)).sections[0].failed}
    assert failed == {f"grad.{name}", f"grad.{dead}"}


def test_gradients_under_other_names(tmp_path):
    """An embedding under its own name, an unread weight left out, two copies with a part each."""
    made = flow_case("pi0", gradients=True)
    root = "paligemma_with_expert.paligemma."
    head = made.gradients.pop(f"{root}lm_head.weight")
    made.gradients[f"{root}model.language_model.embed_tokens.weight"] = head
    del made.gradients["paligemma_with_expert.gemma_expert.lm_head.weight"]
    check(made.write(tmp_path / "openpi"))
    made = flow_case("open_pi_zero", dims=ZERO, cameras=("only",), gradients=True)
    for name in [n for n in made.gradients if ".proprio." in n]:
        made.gradients[name] = 0.3 * made.gradients[name]
        twin = name.replace(".proprio.", ".action.")
        made.gradients[twin] = 0.7 * made.gradients[twin]
    check(made.write(tmp_path / "copies"))


def test_gradients_that_are_zero_but_for_rounding(tmp_path):
    """SigLIP's key bias moves no softmax: what stands there is noise, and no relative norm fits."""
    made = flow_case("pi0", gradients=True)
    root = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.layers.0."
    name = f"{root}self_attn.k_proj.bias"
    made.gradients[name] = 1e-8 * torch.randn(made.gradients[name].shape)
    report = check(made.write(tmp_path / "noise"))
    (row,) = [r for r in report.sections[0].rows if r.name == f"grad.{name}"]
    assert "zero but for rounding" in row.verdict.note
    made.gradients[name] = 1e-2 * torch.randn(made.gradients[name].shape)
    assert not check_case(made.write(tmp_path / "signal")).ok


def test_what_is_not_known_is_listed(tmp_path):
    made = flow_case("pi0")
    made.io["out.attention_entropy"] = torch.zeros(2)
    (section,) = check_case(made.write(tmp_path)).sections
    assert section.ok
    assert section.unknown == ["out.attention_entropy"]


def test_what_should_be_known_fails_instead_of_being_passed_over(tmp_path):
    made = flow_case("pi0")
    made.io |= {
        f"out.{name}": torch.zeros(2)
        for name in ("cache_k.9", "cache_v.action.0", "adarms_cond", "vision_features.elbow")
    }
    made.gradients = {"some.other.weight": torch.zeros(3)}
    (section,) = check_case(made.write(tmp_path)).sections
    assert {row.name: row.verdict.note for row in section.failed} == {
        "out.cache_k.9": "this model has layers 0 to 2",
        "out.cache_v.action.0": "this model caches the streams vlm and state, not 'action'",
        "out.adarms_cond": "this model has no adarms_cond",
        "out.vision_features.elbow": "no camera 'elbow'; the case has ['front', 'wrist']",
        "grad.some.other.weight": f"no such tensor in {tmp_path / 'weights.safetensors'}",
    }


def test_a_case_without_anything_to_compare_does_not_pass(tmp_path):
    made = flow_case("pi0")
    made.io = {n: x for n, x in made.io.items() if n.startswith("in.")}
    assert not check_case(made.write(tmp_path)).ok


def test_missing_inputs_and_wrong_shapes_fail(tmp_path):
    made = flow_case("pi0")
    del made.io["in.time"]
    report = check_case(made.write(tmp_path / "time"))
    failed = {row.name: row.verdict.note for row in report.sections[0].failed}
    assert "in.time" in failed["out.velocity"]
    assert "out.actions.steps3" not in failed
    made = flow_case("pi0")
    made.io["out.velocity"] = made.io["out.velocity"][:2]
    (failed,) = check_case(made.write(tmp_path / "shape")).sections[0].failed
    assert failed.verdict.note == "shape [3, 3, 5], stored [2, 3, 5]"
    made = flow_case("pi0")
    made.io["out.x_t"][0, 0, 0] = float("nan")
    (failed,) = check_case(made.write(tmp_path / "nan")).sections[0].failed
    assert failed.verdict.note == "not finite"


def test_weights_that_do_not_load_fail(tmp_path):
    made = flow_case("pi0")
    del made.weights["action_in_proj.weight"]
    (section,) = check_case(made.write(tmp_path)).sections
    assert not section.ok
    assert section.error is not None
    assert "action_in_proj.weight" in section.error


def test_rows_are_taken_in_order(tmp_path):
    made = flow_case("pi0")
    made.io["out.velocity"] += 0.01
    made.extra["tolerance_rows"] = [{"match": "out.velo*", "atol": 0.02}, *ROWS]
    check(made.write(tmp_path / "first"))
    made.extra["tolerance_rows"] = [*ROWS, {"match": "out.velo*", "atol": 0.02}]
    assert not check_case(made.write(tmp_path / "last")).ok
    made.extra["tolerance_rows"] = []
    made.io["out.velocity"] -= 0.01
    assert "(assumed)" in str(check(made.write(tmp_path / "none")).sections[0].rows[0].rule)
    made.extra["tolerance_rows"] = [{"match": "out.x_t", "tolerance": 1}, *ROWS]
    (failed,) = check_case(made.write(tmp_path / "nonsense")).sections[0].failed
    assert "gives no tolerance" in failed.verdict.note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "diffusion"}, r"family must be one of .*'pi0'.*, got 'diffusion'"),
        ({"dtype": "int4"}, r"dtype must be one of .*'float32'.*, got 'int4'"),
        ({"tolerance_rows": [{"atol": 1}]}, r'lacks "match"'),
    ],
)
def test_words_for_what_is_no_case(tmp_path, change, message):
    made = flow_case("pi0")
    made.extra |= change
    with pytest.raises(ValueError, match=message):
        check_case(made.write(tmp_path))


def test_words_for_a_folder_without_files(tmp_path):
    with pytest.raises(ValueError, match=r"no parity case: it lacks case\.json"):
        check_case(tmp_path)
    made = flow_case("pi0")
    with pytest.raises(ValueError, match="holds no weights"):
        check_case(made.write(tmp_path, weights=None))
    (tmp_path / "io.safetensors").write_bytes(b"nothing")
    save_file(load_file(_weights(made, tmp_path)), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"io\.safetensors cannot be read"):
        check_case(tmp_path)


def _weights(made: Made, folder: Path) -> Path:
    save_file(made.weights, folder / "weights.safetensors")
    return folder / "weights.safetensors"
