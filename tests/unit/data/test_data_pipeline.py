"""The pipeline: shapes, masks, its inverse, and that a folder is enough to rebuild it."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
import torch
from rlds_demo import open_demo

from pizero.data import PolicyPipeline, Statistics, compute_statistics


def test_a_batch_has_the_models_shapes(demo, make_pipeline):
    pipeline = make_pipeline()
    frames = [0, 5, 10, 36]
    batch = pipeline.collate([pipeline.encode(demo.read(i)) for i in frames], frames)
    assert batch.observation.images.shape == (4, 2, 3, 16, 16)
    assert batch.observation.images.dtype == torch.uint8
    assert batch.observation.tokens.shape == (4, 24)
    assert batch.observation.state.shape == (4, 1, 5)
    assert batch.actions.shape == batch.action_mask.shape == (4, 4, 6)
    assert batch.sample.tolist() == frames
    assert batch.observation.image_mask is None  # no camera is missing
    pixel = batch.observation.images[2, 0, :, 3, 3].tolist()
    sample = demo.read(10)
    assert pixel == [sample["episode"] * 10, sample["step"] * 10, 0]
    state = pipeline.statistics["state"]
    expected = (sample["state"][0] - state.mean) / (state.std + 1e-6)
    expected = np.where(state.std < 1e-4, 0, expected)
    np.testing.assert_allclose(batch.observation.state[2, 0, :4], expected, atol=1e-5)
    assert (batch.observation.state[..., 4:] == 0).all()
    assert (batch.actions[..., 4:] == 0).all()


def test_action_mask_counts_real_actions(demo, make_pipeline):
    sample = demo.read(len(demo) - 2)  # two real actions, two repeated
    for past, padding in [(False, False), (True, False), (False, True), (True, True)]:
        pipeline = make_pipeline(learn_past_end=past, learn_padding=padding)
        mask = pipeline.encode(sample)["action_mask"]
        assert mask[:2, :4].all()
        assert (mask[2:, :4] == past).all()
        assert (mask[:2, 4:] == padding).all()


def test_missing_camera_is_black_and_masked(demo, make_pipeline):
    pipeline = make_pipeline()
    i = int(demo.episode_starts[2])
    batch = pipeline.collate([pipeline.encode(demo.read(j)) for j in (0, i)], [0, i])
    assert batch.observation.image_mask.tolist() == [[True, True], [True, False]]
    assert (batch.observation.images[1, 1] == 0).all()


def test_tokens_are_padded_or_trimmed(demo, make_pipeline):
    def encoded(pipeline):  # an instruction and none
        return [pipeline.encode(demo.read(int(demo.episode_starts[e]))) for e in (0, 3)]

    fixed, trimmed = make_pipeline(), make_pipeline(trim_tokens=True)
    full = fixed.collate(encoded(fixed), [0, 1]).observation
    short = trimmed.collate(encoded(trimmed), [0, 1]).observation
    width = int(full.token_mask.sum(1).max())
    assert short.tokens.shape == (2, width)
    assert torch.equal(short.tokens, full.tokens[:, :width])
    assert torch.equal(short.token_mask, full.token_mask[:, :width])
    assert (full.tokens[~full.token_mask] == 0).all()
    alone = trimmed.collate(encoded(trimmed)[:1], [0]).observation
    assert alone.token_mask is None


def test_overlong_prompts_are_refused(make_pipeline):
    pipeline = make_pipeline(max_tokens=4)
    images = {"corner": np.zeros((16, 16, 3), np.uint8)}
    message = r"at most max_tokens=4 tokens, got \d+: 'a long instruction'; raise max_tokens"
    with pytest.raises(ValueError, match=message):
        pipeline.observation(images=images, text="a long instruction", state=np.zeros(4))


@pytest.mark.parametrize("prompt", ["pi0", "pi05"])
def test_overlong_instructions_are_found_before_training(make_pipeline, prompt):
    texts = ["", "go", "a long instruction", "a longer instruction than that"]
    pipeline = make_pipeline(prompt=prompt, max_tokens=400)
    pipeline.refuse_long(texts)
    images, state = {"corner": np.zeros((16, 16, 3), np.uint8)}, pipeline.statistics["state"].mean
    length = len(pipeline.observation(images=images, text=texts[3], state=state)["tokens"])
    with pytest.raises(ValueError, match=f"of 4 instructions with more, up to {length}: 'a longer"):
        make_pipeline(prompt=prompt, max_tokens=length - 1).refuse_long(texts)
    make_pipeline(prompt=prompt, max_tokens=length - 1, cut_prompts=True).refuse_long(texts)


def test_overlong_prompts_are_cut_with_one_warning(make_pipeline, caplog):
    pipeline = make_pipeline(max_tokens=4, cut_prompts=True)
    images = {"corner": np.zeros((16, 16, 3), np.uint8)}
    with caplog.at_level(logging.WARNING):
        for text in ("a long instruction", "and another one"):
            encoded = pipeline.observation(images=images, text=text, state=np.zeros(4))
            assert len(encoded["tokens"]) == 4
    assert len(caplog.records) == 1
    assert "is cut to max_tokens=4" in caplog.text


@pytest.mark.parametrize("kind", ["z_score", "min_max", "quantile", "identity"])
@pytest.mark.parametrize("delta", [None, [True, True, False]])
def test_decoding_undoes_encoding(demo_path, make_pipeline, kind, delta):
    demo = open_demo(demo_path)
    pipeline = make_pipeline(
        statistics=compute_statistics(demo, delta_mask=delta),
        normalization={"state": kind, "action": kind},
        delta_mask=delta,
    )
    samples = [demo.read(i) for i in (0, 9, 20)]
    batch = pipeline.collate([pipeline.encode(s) for s in samples], [0, 1, 2])
    states = np.stack([s["state"][-1] for s in samples])
    decoded = pipeline.decode_actions(batch.actions, states)
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, [s["actions"] for s in samples], atol=1e-4)
    if delta:
        step = batch.actions[1, 1, 1].item() - batch.actions[1, 0, 1].item()
        assert step != 0
        with pytest.raises(ValueError, match="actions are relative to the state; expected state"):
            pipeline.decode_actions(batch.actions)


def test_training_and_serving_encode_alike(demo, make_pipeline):
    pipeline = make_pipeline()
    sample = demo.read(4)
    trained = pipeline.encode(sample)
    served = pipeline.observation(
        images=sample["images"], text=sample["text"], state=sample["state"][0]
    )
    for key, value in served.items():
        np.testing.assert_array_equal(value, trained[key])
    observation = pipeline.collate_observations([served])
    assert observation.images.shape == (1, 2, 3, 16, 16)


def test_pi05_puts_the_state_into_the_prompt(demo, make_pipeline):
    pipeline = make_pipeline(prompt="pi05", state_dim=None, max_tokens=80)
    encoded = pipeline.encode(demo.read(0))
    assert "state" not in encoded
    text = pipeline.tokenizer.decode(encoded["tokens"])
    state = pipeline._normalizers["state"].normalize(demo.read(0)["state"][0])
    bins = " ".join(str(int(b)) for b in np.clip(np.floor((state + 1) * 128), -1, 255))
    assert text == f"Task: do task 0, State: {bins};\nAction: "
    assert pipeline.collate([encoded], [0]).observation.state is None


def test_lerobots_pi05_prompt_pads_the_state(demo, make_pipeline):
    """With zeros after normalisation, to the width of the actions: bin 128."""
    pipeline = make_pipeline(prompt="lerobot_pi05", state_dim=None, max_tokens=80, action_dim=9)
    text = pipeline.tokenizer.decode(pipeline.encode(demo.read(0))["tokens"])
    openpi = make_pipeline(prompt="pi05", state_dim=None, max_tokens=80)
    short = openpi.tokenizer.decode(openpi.encode(demo.read(0))["tokens"])
    assert text == short.replace(";", " 128" * 5 + ";")


def test_cameras_that_are_black_rather_than_masked(make_pipeline):
    images = {"corner": np.zeros((16, 16, 3), np.uint8)}
    for black, seen in (([], [True, False]), (["wrist"], [True, True])):
        pipeline = make_pipeline(black_cameras=black)
        encoded = pipeline.observation(images=images, text="x", state=np.zeros(4))
        assert encoded["image_mask"].tolist() == seen
    with pytest.raises(ValueError, match="black_cameras to be one of corner, wrist, got 'wrst'"):
        make_pipeline(black_cameras=["wrst"])


def test_pictures_of_floats_with_channels_first(make_pipeline):
    pipeline = make_pipeline()
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    floats = np.moveaxis(picture, -1, 0).astype(np.float32) / 255
    got = [
        pipeline.observation(images={"corner": image}, text="x", state=np.zeros(4))["images"][0]
        for image in (picture, np.moveaxis(picture, -1, 0), floats)
    ]
    np.testing.assert_array_equal(got[1], got[0])
    assert np.abs(got[2].astype(int) - got[0]).max() <= 1  # truncated, not rounded


def test_states_with_and_without_a_history(demo_path, make_pipeline):
    """Actions are relative to the newest of several states, whatever the batch."""
    demo = open_demo(demo_path, frames=3)
    pipeline = make_pipeline(frames=3, delta_mask=[True, True])
    samples = [demo.read(i) for i in (4, 20)]
    batch = pipeline.collate([pipeline.encode(s) for s in samples], [0, 1])
    for i, sample in enumerate(samples):
        for state in (sample["state"], sample["state"][-1]):
            back = pipeline.decode_actions(batch.actions[i], state)
            np.testing.assert_allclose(back, sample["actions"], atol=1e-4)
    states = np.stack([s["state"] for s in samples])
    for state in (states, states[:, -1]):
        back = pipeline.decode_actions(batch.actions, state)
        np.testing.assert_allclose(back, [s["actions"] for s in samples], atol=1e-4)
    with pytest.raises(ValueError, match=r"expected state \[S\], got parts \['arm'\] and no robot"):
        pipeline.decode_actions(batch.actions[0], {"arm": np.zeros(4)})


def test_history_becomes_further_cameras(demo_path, make_pipeline):
    demo = open_demo(demo_path, frames=3)
    pipeline = make_pipeline(frames=3)
    batch = pipeline.collate([pipeline.encode(demo.read(2))], [2])
    assert batch.observation.images.shape == (1, 6, 3, 16, 16)
    assert batch.observation.images[0, :3, 1, 0, 0].tolist() == [0, 10, 20]
    assert batch.observation.state.shape == (1, 3, 5)


def test_pictures_are_resized(make_pipeline):
    pipeline = make_pipeline(image_size=(8, 12), resize="pad")
    image = np.full((20, 20, 3), 200, np.uint8)
    encoded = pipeline.observation(images={"corner": image}, text="x", state=np.zeros(4))
    assert encoded["images"].shape == (2, 8, 12, 3)
    assert encoded["images"][0, 0, :, 0].tolist() == [0] * 2 + [200] * 8 + [0] * 2


def test_a_folder_is_enough_to_rebuild_it(demo, make_pipeline, tmp_path):
    pipeline = make_pipeline()
    names = pipeline.save_assets(tmp_path)
    assert names == {"statistics": "stats.json", "tokenizer": "tokenizer.model"}
    again = make_pipeline(**{k: str(tmp_path / v) for k, v in names.items()})
    copy = pickle.loads(pickle.dumps(pipeline))
    expected = pipeline.encode(demo.read(3))
    for other in (again, copy):
        for key, value in other.encode(demo.read(3)).items():
            np.testing.assert_array_equal(value, expected[key])


def test_statistics_wider_than_the_robot_are_cut_on_request(demo, make_pipeline):
    wide = {
        name: Statistics.of(np.random.default_rng(0).normal(size=(50, 6)))
        for name in ("state", "action")
    }
    with pytest.raises(ValueError, match=r"expected a state of 6 numbers, .* got 4"):
        make_pipeline(statistics=wide, state_dim=6).encode(demo.read(0))
    pipeline = make_pipeline(statistics=wide, robot_state_dim=4, robot_action_dim=4)
    assert pipeline.robot_action_dim == 4
    assert pipeline.encode(demo.read(0))["actions"].shape == (4, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cameras": []}, r"expected distinct camera names, got \[\]"),
        ({"cameras": ["a", "a"]}, "expected distinct camera names"),
        ({"image_size": [16]}, r"expected image_size \(height, width\), got \[16\]"),
        ({"resize": "lanczoz"}, "got 'lanczoz'; did you mean 'lanczos'"),
        ({"prompt": "pi-0"}, "prompt to be one of pi0, pi05, .*got 'pi-0'; did you mean 'pi0'"),
        ({"normalization": {"actions": "z_score"}}, "got 'actions'; did you mean 'action'"),
        ({"normalization": {"state": "z_score"}}, "expected normalization of 'action'"),
        ({"normalization": {"action": "z_score"}}, "expected normalization of 'state'"),
        ({"normalization": {"action": "zscore", "state": "z_score"}}, "normalization of 'action'"),
        (
            {"normalization": {"action": {"knd": "z"}}},
            "normalization.action .* did you mean 'kind'",
        ),
        ({"normalization": {"action": {"clip": 1.0}}}, r"a kind in .* 'action', got \['clip'\]"),
        ({"action_dim": 3}, "action statistics have 4 dimensions, but .*action_dim is 3"),
        ({"state_dim": 3}, "state statistics have 4 dimensions, but .*state_dim is 3"),
        ({"tokenizer": "nowhere.model"}, "no tokenizer at nowhere.model"),
        ({"statistics": "nowhere.json"}, "no statistics at nowhere.json"),
    ],
)
def test_wrong_arguments_are_refused(make_pipeline, changes, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(**changes)


def test_statistics_without_a_needed_name(demo, make_pipeline):
    only = {"action": compute_statistics(demo)["action"]}
    with pytest.raises(ValueError, match=r"expected statistics of 'state', got only \['action'\]"):
        make_pipeline(statistics=only)


def test_wrong_observations_are_refused(demo, make_pipeline):
    pipeline = make_pipeline()
    image = np.zeros((16, 16, 3), np.uint8)
    state = np.zeros(4)
    for arguments, message in [
        ({"images": {"cornr": image}}, "got 'cornr'; did you mean 'corner'"),
        ({"images": {}}, "expected images of corner, wrist, got no image"),
        ({"images": {"corner": image - 1.0}}, r"camera 'corner': .* floats in \[0, 1\], got -1"),
        ({"images": {"corner": image.astype(int)}}, r"camera 'corner': expected uint8 .* int64"),
        ({"images": {"corner": image[..., 0]}}, r"camera 'corner': .*got uint8 \[16, 16\]"),
        ({"images": {"corner": np.stack([image] * 2)}}, "expected 1 frames, got 2"),
        ({"state": None}, "this policy reads the robot's state"),
        ({"state": np.zeros((2, 4))}, r"expected state \[S\] or \[1 S\] .* got \[2, 4\]"),
        ({"state": np.zeros(3)}, "expected a state of 4 numbers, as in the statistics, got 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipeline.observation(
                **({"images": {"corner": image}, "text": "x", "state": state} | arguments)
            )
    with pytest.raises(ValueError, match=r"expected actions \[\.\.\. 6\] .* shape \[4, 4\]"):
        pipeline.decode_actions(np.zeros((4, 4)))
    sample = demo.read(0)
    with pytest.raises(ValueError, match=r"expected actions of shape \[4, 4\] .* got \[3, 4\]"):
        pipeline.encode(sample | {"actions": sample["actions"][:3]})


def test_importing_data_leaves_tensorflow_out():
    import subprocess
    import sys

    code = "import sys, pizero.data; sys.exit(any('tensorflow' in m for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert PolicyPipeline.__module__ == "pizero.data.pipeline"
