"""The Metaworld tasks in use: what each is called in words, and what its scene shares with others.

Metaworld has no language. The sentences here are ours: the first is the plain one, the others say
the same in other words, and none fits a second task.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskSpec:
    """One task: its sentences, its scene's group, and which scene parts matter to the eye.

    Tasks with the same `group` share scene and starts, so only the words tell them apart. `marker`:
    the goal is a point in space, visible only through its marker. `span_x`: the half-width of the
    start range along x, where tasks of one group differ in Metaworld.
    """

    name: str
    sentences: tuple[str, ...]
    group: str = ""
    marker: bool = False
    span_x: float | None = None

    @property
    def scene(self) -> str:
        return self.group or self.name


_TASKS = (
    TaskSpec(
        "drawer-open",
        (
            "open the drawer",
            "pull the drawer open",
            "slide the green drawer out",
            "pull the drawer out by its handle",
            "grab the handle and open the drawer",
        ),
    ),
    TaskSpec(
        "drawer-close",
        (
            "close the drawer",
            "push the drawer shut",
            "slide the green drawer back in",
            "push the drawer in",
            "shut the open drawer",
        ),
    ),
    TaskSpec(
        "faucet-open",
        (
            "open the faucet",
            "turn the faucet on",
            "turn on the tap",
            "open the tap",
            "rotate the faucet handle to the right to open it",
        ),
        group="faucet",
        span_x=0.05,
    ),
    TaskSpec(
        "faucet-close",
        (
            "close the faucet",
            "turn the faucet off",
            "turn off the tap",
            "close the tap",
            "rotate the faucet handle to the left to close it",
        ),
        group="faucet",
        span_x=0.05,
    ),
    TaskSpec(
        "button-press",
        (
            "press the button",
            "push the red button in",
            "press the red button on the front of the box",
            "hit the button on the yellow box",
            "push the button forward",
        ),
    ),
    TaskSpec(
        "push",
        (
            "push the puck to the green mark",
            "slide the yellow puck to the green ball",
            "move the puck along the table to the green target",
            "shove the yellow puck to the green spot",
            "bring the puck across the table to the green point",
        ),
        marker=True,
    ),
    TaskSpec(
        "pick-place",
        (
            "pick up the puck and put it at the blue mark",
            "lift the yellow puck to the blue ball",
            "grasp the puck and carry it to the blue target",
            "pick the puck up and place it on the blue spot",
            "raise the yellow puck to the blue point",
        ),
        marker=True,
    ),
    TaskSpec(
        "reach",
        (
            "move the hand to the red mark",
            "reach for the red ball",
            "bring the gripper to the red target",
            "touch the red point with the hand",
        ),
        marker=True,
    ),
    TaskSpec(
        "door-open",
        (
            "open the door",
            "pull the door open",
            "swing the door open by its handle",
            "open the safe door",
        ),
    ),
    TaskSpec(
        "window-open",
        (
            "open the window",
            "slide the window open",
            "push the window to the right",
            "move the window handle to the right",
        ),
    ),
    TaskSpec(
        "window-close",
        (
            "close the window",
            "slide the window shut",
            "push the window to the left",
            "move the window handle to the left",
        ),
    ),
    TaskSpec(
        "button-press-topdown",
        (
            "press the button from above",
            "push the button down",
            "press down the button on top of the box",
            "push down the red button",
        ),
    ),
)
TASKS = {task.name: task for task in _TASKS}
