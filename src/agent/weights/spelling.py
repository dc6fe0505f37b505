"""One spelling for the many that PyTorch checkpoints of this family use.

openpi, LeRobot (all versions), giga-models, open-pi-zero and transformers name the same Gemma and
SigLIP layers under different roots. Here a stored name becomes one of

    vision.embeddings... vision.encoder.layers.N... vision.post_layernorm...    projector.weight
    embed.weight  head.weight  vlm.layers.N...  vlm.norm...                     (transformers' names
    expert.layers.N...  expert.norm...  expert.head.weight                       below each root)
    state_proj...  action_in_proj...  action_time_mlp_in...  time_mlp_in...  action_out_proj...

or, where no rule fits, stays as it is and is an error in the end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_WRAPPERS = ("_orig_mod.", "module.", "model.")  # torch.compile, DDP, LeRobot and transformers
_VLM = r"(?:paligemma_with_expert\.)?(?:paligemma\.|vlm\.)?(?:model\.)?"
_EXPERT = r"(?:paligemma_with_expert\.)?(?:gemma_expert\.(?:model\.)?|dit\.)"
_GIGA = r"paligemma_with_expert\.layers\.(\d+)\."
_RULES = [
    (rf"{_VLM}vision_tower\.(?:vision_model\.)?(.+)", r"vision.\1"),
    (rf"{_VLM}multi_modal_projector\.linear\.(weight|bias)", r"projector.\1"),
    (rf"{_VLM}language_model\.(?:model\.)?((?:layers|norm)\..+)", r"vlm.\1"),
    (rf"{_VLM}(?:language_model\.)?(?:model\.)?embed_tokens\.weight", r"embed.weight"),
    (rf"{_VLM}(?:language_model\.)?lm_head\.weight", r"head.weight"),
    (rf"{_EXPERT}((?:layers|norm)\..+)", r"expert.\1"),
    (r"(?:paligemma_with_expert\.)?gemma_expert\.lm_head\.weight", r"expert.head.weight"),
    (r"dit\.embed_tokens\.weight", r"expert.head.weight"),
    (r"embed_action_time\.((?:state_proj|action_in_proj|action_time_mlp_(?:in|out))\..+)", r"\1"),
    # giga-models pairs the two experts in every layer: 0 is the language model, 1 the action expert
    (rf"{_GIGA}self_attn\.([qkvo]_proj)\.([01])\.(.+)", r"\3.layers.\1.self_attn.\2.\4"),
    (rf"{_GIGA}mlps\.([01])\.(.+)", r"\2.layers.\1.mlp.\3"),
    (rf"{_GIGA}(input|post_attention)_layernorms\.([01])\.(.+)", r"\3.layers.\1.\2_layernorm.\4"),
    (r"paligemma_with_expert\.norms\.([01])\.(.+)", r"\1.norm.\2"),
    # open-pi-zero
    (r"joint_model\.mixtures\.vlm\.(.+)", r"vlm.\1"),
    (r"joint_model\.mixtures\.action\.(.+)", r"expert.\1"),
    (r"joint_model\.mixtures\.proprio\.(.+)", r"tied.\1"),
    (r"proprio_encoder\.(.+)", r"state_proj.\1"),
    (r"action_encoder\.linear_1\.(.+)", r"action_in_proj.\1"),
    (r"action_encoder\.linear_2\.(.+)", r"time_action_mlp_in.\1"),
    (r"action_encoder\.linear_3\.(.+)", r"action_time_mlp_out.\1"),
    (r"action_decoder\.(.+)", r"action_out_proj.\1"),
]
_COMPILED = [(re.compile(pattern), to) for pattern, to in _RULES]


def spell(name: str) -> str:
    """The one spelling of a stored name; the name itself where no rule knows it."""
    while wrapper := next((w for w in _WRAPPERS if name.startswith(w)), None):
        name = name.removeprefix(wrapper)
    for pattern, to in _COMPILED:
        if match := pattern.fullmatch(name):
            spelled = match.expand(to)
            return {"0.": "vlm.", "1.": "expert."}.get(spelled[:2], spelled[:2]) + spelled[2:]
    return name


def spell_all(names: Iterable[str]) -> dict[str, str]:
    """Spelling -> stored name. Raises ValueError where two stored names mean the same tensor."""
    spelled: dict[str, str] = {}
    for name in names:
        other = spelled.setdefault(spell(name), name)
        if other != name:
            raise ValueError(f"two stored tensors mean the same one: {other} and {name}")
    return spelled
