"""Adapters: the weights that a mechanism brings along, the projections trained to it, and LoRAs on them.

An adapter is a folder of up to three files (`files.py` says which), or one safetensors file. Tensors carry the names of
the model's own parameters (`transformer_blocks.0.attn.to_q.weight`); the mechanism's own weights lie under their
layer's `processor` (`transformer_blocks.0.attn.processor.spatial_weight`), as in the files that CLEAR released. Ours
say in the metadata what they are: mechanism, layers, model class. CLEAR's have no metadata; their radius and pooling
factor are read from the file name or given. A LoRA lies in a file of diffusers' own format, which
`pipe.load_lora_weights` takes as well.

Loading is strict: every missing, unexpected and misshapen tensor is named, and nothing is changed before all is well.
"""

from .checks import expected_parameters, mechanism_weights
from .files import Adapter
from .loading import load
from .saving import push, save, write

__all__ = ["Adapter", "expected_parameters", "load", "mechanism_weights", "push", "save", "write"]
