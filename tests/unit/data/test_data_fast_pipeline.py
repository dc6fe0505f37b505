"""The pipeline of a policy that spells its actions: questions, answers, and answers read."""

from __future__ import annotations

import numpy as np
import pytest

from pizero.data import FastTokenizer, PolicyPipeline, UndecodableActions
from pizero.data.tokenizer import state_bins

ROOM = 1024


@pytest.fixture(scope="module")
def fast_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fast")
    chunks = np.random.default_rng(0).uniform(-2, 2, (60, 4, 4))
    FastTokenizer.fit(chunks, vocab_size=300).save(folder)
    return folder


@pytest.fixture
def make_fast(make_pipeline, fast_folder):
    def make(**changes) -> PolicyPipeline:
        arguments = dict(
            prompt="fast", action_tokenizer=fast_folder, vocab_size=ROOM, max_tokens=120,
            state_dim=None, normalization={"state": "quantile", "action": "quantile"},
        )  # fmt: skip
        return make_pipeline(**(arguments | changes))

    return make


def test_question_and_answer(demo, make_fast):
    pipeline, sample = make_fast(), demo.read(0)
    encoded = pipeline.encode(sample)
    learnt = encoded["token_loss"]
    assert np.array_equal(encoded["token_causal"], learnt)
    state = pipeline._normalizers["state"].normalize(sample["state"][-1])
    bins = " ".join(map(str, state_bins(state)))
    question = pipeline.tokenizer.decode(encoded["tokens"][~learnt])
    assert question == f"Task: do task 0, State: {bins};\n"
    asked = pipeline.observation(
        images=sample["images"], text=sample["text"], state=sample["state"]
    )
    assert np.array_equal(asked["tokens"], encoded["tokens"][~learnt])
    assert "token_loss" not in asked
    # The answer spells the actions, which come back as the robot's.
    answer = encoded["tokens"][learnt]
    actions = pipeline.read_answer(answer)
    assert actions.dtype == np.float32
    assert actions.shape == encoded["actions"].shape
    assert np.abs(actions - encoded["actions"]).max() < 0.1
    robot = pipeline.decode_actions(actions)
    spread = np.ptp(sample["actions"], axis=0).max() + 1
    np.testing.assert_allclose(robot, sample["actions"], atol=spread)


@pytest.mark.parametrize("trim", [False, True])
def test_batches_are_marked(demo, make_fast, trim):
    pipeline = make_fast(trim_tokens=trim)
    encoded = [pipeline.encode(demo.read(i)) for i in (0, 9)]
    batch = pipeline.collate(encoded, [0, 9]).observation
    for i, row in enumerate(encoded):
        n = len(row["tokens"])
        assert batch.token_mask is None or batch.token_mask[i].sum() == n
        for name in ("token_causal", "token_loss"):
            marks = getattr(batch, name)[i]
            assert np.array_equal(marks[:n], row[name])
            assert not marks[n:].any()
    asked = pipeline.observation(images=demo.read(0)["images"], text="x", state=np.zeros(4))
    observation = pipeline.collate_observations([asked])
    assert observation.token_causal is None
    assert observation.token_loss is None
    assert observation.state is None


def test_other_prompts_have_no_marks(demo, make_pipeline):
    pipeline = make_pipeline()
    batch = pipeline.collate([pipeline.encode(demo.read(0))], [0])
    assert batch.observation.token_causal is None
    with pytest.raises(ValueError, match=r"read with the prompt 'fast', this one is 'pi0'"):
        pipeline.read_answer([1])


def test_cut_answers_are_said_and_not_decodable(demo, make_fast, caplog):
    pipeline = make_fast()
    whole = pipeline.encode(demo.read(0))
    short = make_fast(max_tokens=len(whole["tokens"]) - 4, cut_prompts=True)
    encoded = short.encode(demo.read(0))
    assert "is cut to max_tokens" in caplog.text
    assert {len(encoded[k]) for k in ("tokens", "token_causal", "token_loss")} == {short.max_tokens}
    with pytest.raises(UndecodableActions, match="coefficients, expected 4 x 4"):
        short.read_answer(encoded["tokens"][encoded["token_loss"]])


def test_assets_rebuild_it(demo, make_fast, tmp_path):
    pipeline = make_fast()
    names = pipeline.save_assets(tmp_path)
    again = make_fast(**{key: tmp_path / name for key, name in names.items()})
    first, second = (p.encode(demo.read(3)) for p in (pipeline, again))
    assert np.array_equal(first["tokens"], second["tokens"])


def test_every_camera_is_black_rather_than_masked(make_fast):
    pipeline = make_fast(black_cameras="all")
    images = {"corner": np.zeros((16, 16, 3), np.uint8)}
    asked = pipeline.observation(images=images, text="x", state=np.zeros(4))
    assert asked["image_mask"].tolist() == [True, True]


def test_prompt_and_tokenizer_belong_together(make_fast):
    for changes in ({"action_tokenizer": None}, {"prompt": "pi05"}):
        with pytest.raises(ValueError, match="'fast' and an action_tokenizer belong together"):
            make_fast(**changes)
