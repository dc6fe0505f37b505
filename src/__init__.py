"""pizero: mixture-of-experts robot policies that meet in block-causal attention.

The three parts are `pizero.model` (torch and einops only), `pizero.data` and `pizero.agent`.
Importing `pizero` itself loads none, so a simulator process can use its share without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pizero.agent.policy import Policy, load_policy

if __name__ != "pizero":
    raise ImportError(
        f"this package is called 'pizero', not {__name__!r}: install it (pip install -e .) and "
        "import pizero"
    )

__version__ = "0.1.0"
__all__ = ["Policy", "__version__", "load_policy"]


def __getattr__(name: str) -> object:
    if name in ("Policy", "load_policy"):
        from pizero.agent import policy

        return getattr(policy, name)
    raise AttributeError(f"module 'pizero' has no attribute {name!r}")
