"""Converters of checkpoints from other mHC implementations to our parameters and back: state dicts in and out.

Hyper-connection tensors are renamed and repacked without arithmetic, so that a round trip gives the same bits; all
other tensors are passed through. `P.hc_attn.phi`, `.alpha` and `.bias` then fit a `HyperConnection` that is the
attribute `hc_attn` of the module `P`, and `hc_head.*` a `StreamHead`.

The others store comb = resᵀ: their post sums comb[j, i] · x_j over j. So the res block of phi and bias is transposed on
the way (docs/design.md, "The maths"); with it, the map is the same but for their small constants, see each file.
"""

from mhc.converters.deepseek import from_deepseek, to_deepseek
from mhc.converters.hugging_face import from_hugging_face, to_hugging_face
from mhc.converters.megatron import from_megatron, to_megatron
from mhc.converters.norm_weight import fold_norm_weight, unfold_norm_weight

__all__ = [
    "fold_norm_weight",
    "from_deepseek",
    "from_hugging_face",
    "from_megatron",
    "to_deepseek",
    "to_hugging_face",
    "to_megatron",
    "unfold_norm_weight",
]
