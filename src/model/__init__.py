"""Experts, the attention they share, and policies made of them. Needs torch and einops alone."""

# Layout and attention
from pizero.model.attention import attend

# Experts
from pizero.model.block import Block
from pizero.model.cache import PrefixCache, RoomyCache

# Flow
from pizero.model.embed import AdaptiveActionEncoder, MixedActionEncoder, SinusoidalTime
from pizero.model.fast import PiZeroFast
from pizero.model.flow import BetaTime, FlowPath, UniformTime
from pizero.model.joint import JointModel
from pizero.model.layout import Segment, TokenLayout
from pizero.model.mixture import Mixture
from pizero.model.norm import AdaRMSNorm, RMSNorm

# Policies, and a model that speaks
from pizero.model.paligemma import Generated, PaliGemma
from pizero.model.pizero import PiZero, Scales, Stream
from pizero.model.positions import PerExpertIndex, SharedCount

# Vision
from pizero.model.vision import ConvTower, SigLIP

__all__ = [
    "AdaRMSNorm",
    "AdaptiveActionEncoder",
    "BetaTime",
    "Block",
    "ConvTower",
    "FlowPath",
    "Generated",
    "JointModel",
    "MixedActionEncoder",
    "Mixture",
    "PaliGemma",
    "PerExpertIndex",
    "PiZero",
    "PiZeroFast",
    "PrefixCache",
    "RMSNorm",
    "RoomyCache",
    "Scales",
    "Segment",
    "SharedCount",
    "SigLIP",
    "SinusoidalTime",
    "Stream",
    "TokenLayout",
    "UniformTime",
    "attend",
]
