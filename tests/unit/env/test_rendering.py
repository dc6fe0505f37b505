"""Camera poses, averaging, and the choice of an OpenGL."""

from __future__ import annotations

import numpy as np
import pytest

from pizero.agent.env import rendering
from pizero.agent.env.rendering import Camera, cameras_from, choose_gl, shrink


def test_shrink_is_the_rounded_mean():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    mean = pixels.astype(np.float64).reshape(3, 2, 4, 2, 3).mean((1, 3))
    np.testing.assert_array_equal(shrink(pixels, 2), np.floor(mean + 0.5))
    np.testing.assert_array_equal(shrink(pixels, 1), pixels)
    assert shrink(np.full((6, 6, 3), 255, np.uint8), 3).tolist() == [[[255] * 3] * 2] * 2


@pytest.mark.parametrize("on_hand", [False, True])
def test_axes_are_a_rotation_that_looks_at_the_target_upright(on_hand):
    camera = Camera(position=(0.5, 0.2, 0.9), target=(0.1, 0.6, 0.0), fovy=40, on_hand=on_hand)
    axes = camera.axes()
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)
    assert np.linalg.det(axes) == pytest.approx(1.0)
    looks = np.subtract(camera.target, camera.position)
    np.testing.assert_allclose(-axes[:, 2], looks / np.linalg.norm(looks), atol=1e-12)
    up = 1 if on_hand else 2
    assert axes[up, 0] == pytest.approx(0.0)  # the picture's rows are level
    assert axes[up, 1] > 0


def test_a_camera_without_a_direction_is_refused():
    with pytest.raises(ValueError, match="must differ, and not only along z"):
        Camera(position=(0, 0, 1), target=(0, 0, 0), fovy=40).axes()
    with pytest.raises(ValueError, match="must differ"):
        Camera(position=(1, 1, 1), target=(1, 1, 1), fovy=40).axes()


def test_a_misspelt_camera_key_is_named():
    with pytest.raises(ValueError, match=r"camera 'corner'.*fov"):
        cameras_from({"corner": {"position": [0, 0, 1], "target": [1, 0, 0], "fov": 40}})


def test_gl_follows_the_environment_then_what_is_there(monkeypatch):
    environment = {"MUJOCO_GL": "glfw", "LP_NUM_THREADS": "4"}
    assert choose_gl(environment) == "glfw"
    assert environment == {"MUJOCO_GL": "glfw", "LP_NUM_THREADS": "4"}
    monkeypatch.setattr(rendering, "_loads", lambda name: True)
    assert choose_gl({}) == "osmesa"
    monkeypatch.setattr(rendering, "_loads", lambda name: "EGL" in name)
    environment = {}
    assert choose_gl(environment) == "egl"
    assert environment == {"MUJOCO_GL": "egl", "LP_NUM_THREADS": "1"}
    monkeypatch.setattr(rendering, "_loads", lambda name: False)
    with pytest.raises(RuntimeError, match=r"libosmesa6.*libegl1 libegl-mesa0"):
        choose_gl({})
