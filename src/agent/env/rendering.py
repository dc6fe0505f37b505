"""Pictures of a MuJoCo scene without a screen: fast, smooth and upright.

On a CPU the time of a picture goes into vertices and multisampling, hardly into pixels. So a scene
is drawn without multisampling, shadows, sky and reflections, at a multiple of the wanted size, and
averaged down: small things keep their sub-pixel places, which a policy needs to aim.

MUJOCO_GL must be settled before mujoco is imported: call `choose_gl` first.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_NO_GL = (
    "no software OpenGL can be loaded, so nothing can be rendered. On Debian or Ubuntu install one "
    "of: libosmesa6 (MUJOCO_GL=osmesa), or libegl1 libegl-mesa0 libgl1-mesa-dri (MUJOCO_GL=egl)"
)


def choose_gl(environment: MutableMapping[str, str] = os.environ) -> str:
    """Settle MUJOCO_GL: as the environment says, else osmesa where there is one, else egl."""
    if not environment.get("MUJOCO_GL"):
        libraries = {"osmesa": ("libOSMesa.so.8", "libOSMesa.so"), "egl": ("libEGL.so.1",)}
        found = [gl for gl, names in libraries.items() if any(_loads(name) for name in names)]
        if not found:
            raise RuntimeError(_NO_GL)
        environment["MUJOCO_GL"] = found[0]
    # Several workers share the machine: a rasteriser with threads of its own only gets in the way.
    environment.setdefault("LP_NUM_THREADS", "1")
    return environment["MUJOCO_GL"]


@dataclass(frozen=True)
class Camera:
    """Where a camera sits, looks and how wide (`fovy`, degrees).

    Metres, in the world (z up); for a camera on the hand, from the hand's centre along the world's
    axes. The picture is upright: `up` points up in it.
    """

    position: Sequence[float]
    target: Sequence[float]
    fovy: float
    on_hand: bool = False

    def axes(self) -> np.ndarray:
        """Columns: right, up and backwards, in world axes."""
        up = np.array([0.0, 1.0, 0.0] if self.on_hand else [0.0, 0.0, 1.0])
        backwards = np.subtract(self.position, self.target, dtype=np.float64)
        length = np.linalg.norm(backwards)
        right = np.cross(up, backwards)
        if np.linalg.norm(right) < 1e-6:
            raise ValueError(
                f"camera at {list(self.position)} looking at {list(self.target)}: the two must "
                f"differ, and not only along {'y' if self.on_hand else 'z'}, the picture's upright"
            )
        right /= np.linalg.norm(right)
        backwards /= length
        return np.stack([right, np.cross(backwards, right), backwards], axis=1)


def place_camera(
    model: Any, slot: str, camera: Camera, hand_axes: np.ndarray | None = None
) -> None:
    """Move the model's camera `slot` there. `hand_axes`: the hand's axes in the world (columns)."""
    mujoco = load_mujoco()

    turn = np.eye(3) if hand_axes is None else hand_axes.T
    index = model.camera(slot).id
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, (turn @ camera.axes()).ravel())
    model.cam_mode[index] = mujoco.mjtCamLight.mjCAMLIGHT_FIXED
    model.cam_pos[index] = turn @ np.asarray(camera.position, dtype=np.float64)
    model.cam_quat[index] = quaternion
    model.cam_fovy[index] = camera.fovy


class Painter:
    """Draws one model. All painters of a process share one OpenGL context."""

    _context: Any = None

    def __init__(self, model: Any, *, max_size: int) -> None:
        mujoco = self._mujoco = load_mujoco()
        self._model = model
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = max_size
        model.light_castshadow[:] = 0
        self._make_current()
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        for flag in ("SHADOW", "REFLECTION", "SKYBOX", "HAZE", "FOG"):
            self._scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = 0
        self._option = mujoco.MjvOption()
        # The gripper's base has 12,000 faces; its hull looks the same from a few pixels.
        self._option.flags[mujoco.mjtVisFlag.mjVIS_CONVEXHULL] = True
        self._perturbation = mujoco.MjvPerturb()
        self._drawing = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)

    def draw(self, data: Any, slot: str, size: int, supersample: int) -> np.ndarray:
        """The picture of one camera, uint8 [size size 3]."""
        mujoco = self._mujoco
        camera = mujoco.MjvCamera()
        camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        camera.fixedcamid = self._model.camera(slot).id
        mujoco.mjv_updateScene(
            self._model,
            data,
            self._option,
            self._perturbation,
            camera,
            mujoco.mjtCatBit.mjCAT_ALL,
            self._scene,
        )
        large = size * supersample
        rectangle = mujoco.MjrRect(0, 0, large, large)
        pixels = np.empty((large, large, 3), dtype=np.uint8)
        # Each time: OpenGL may still be drawing into, and reading from, another painter's buffer.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._drawing)
        mujoco.mjr_render(rectangle, self._scene, self._drawing)
        mujoco.mjr_readPixels(pixels, None, rectangle, self._drawing)
        return shrink(pixels[::-1], supersample)  # OpenGL's first row is the lowest

    @classmethod
    def _make_current(cls) -> None:
        """One context for all; its own size is of no concern, since each painter has its buffer."""
        if cls._context is not None:
            return
        try:
            context = load_mujoco().GLContext(64, 64)
            context.make_current()
        except Exception as error:
            gl = os.environ.get("MUJOCO_GL", "")
            raise RuntimeError(f"MUJOCO_GL={gl} cannot render ({error}). {_NO_GL}") from error
        cls._context = context


def shrink(pixels: np.ndarray, factor: int) -> np.ndarray:
    """The mean of each factor x factor square of a uint8 picture [h w 3], rounded."""
    if factor == 1:
        return np.ascontiguousarray(pixels)
    height, width, channels = pixels.shape
    total = np.zeros((height // factor, width // factor, channels), dtype=np.uint16)
    for row in range(factor):
        for column in range(factor):
            total += pixels[row::factor, column::factor]
    return ((total + factor * factor // 2) // (factor * factor)).astype(np.uint8)


def cameras_from(options: Mapping[str, Mapping[str, Any]]) -> dict[str, Camera]:
    """Cameras as a config names them: {name: {position, target, fovy, on_hand}}."""
    cameras = {}
    for name, values in options.items():
        try:
            cameras[name] = Camera(**values)
        except TypeError as error:
            raise ValueError(f"camera {name!r}: {error}") from error
    return cameras


def load_mujoco() -> Any:
    """Imported late, since that settles how to render; the module has no types to check against."""
    import mujoco

    return mujoco


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
