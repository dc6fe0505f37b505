"""Data: episodes read in place, normalised and turned into what the policy sees, and back."""

from __future__ import annotations

# What is on disk
from pizero.data.rlds import (
    CorruptRecordError,
    DatasetSpec,
    FeatureSpec,
    RldsWriter,
    open_index,
)

# isort: split
# Frames, and the order in which they are drawn
from pizero.data.dataset import EpisodeDataset, RldsDataset
from pizero.data.mix import Mix
from pizero.data.sampler import Order, rank_samples
from pizero.data.select import Filters
from pizero.data.standardize import Rule, Standard

# isort: split
# Between the robot's units and the model's
from pizero.data.augment import Augmentation, Recipe
from pizero.data.fast_prompt import FastPrompt
from pizero.data.fast_tokenizer import FastTokenizer, UndecodableActions
from pizero.data.images import decode_image, encode_image, resize_image
from pizero.data.normalize import Normalizer
from pizero.data.pipeline import PolicyPipeline
from pizero.data.robot import Robot
from pizero.data.stats import (
    Statistics,
    compute_statistics,
    load_statistics,
    save_statistics,
)
from pizero.data.tokenizer import Tokenizer, train_tokenizer

# isort: split
# Batches
from pizero.data.loader import TrainLoader, ValLoader

__all__ = [
    "Augmentation",
    "CorruptRecordError",
    "DatasetSpec",
    "EpisodeDataset",
    "FastPrompt",
    "FastTokenizer",
    "FeatureSpec",
    "Filters",
    "Mix",
    "Normalizer",
    "Order",
    "PolicyPipeline",
    "Recipe",
    "RldsDataset",
    "RldsWriter",
    "Robot",
    "Rule",
    "Standard",
    "Statistics",
    "Tokenizer",
    "TrainLoader",
    "UndecodableActions",
    "ValLoader",
    "compute_statistics",
    "decode_image",
    "encode_image",
    "load_statistics",
    "open_index",
    "rank_samples",
    "resize_image",
    "save_statistics",
    "train_tokenizer",
]
