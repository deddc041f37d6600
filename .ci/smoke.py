"""What an installed wheel must do, from any directory: load its extension, and answer with the embedded model.

Exits with an error otherwise.
"""

import sys
from pathlib import Path

import torch

import condense_core
from condense_core import Condenser, ops
from condense_core.decoder.embedded import embedded_model_path
from condense_core.ops import native, reference
from condense_core.ops.arguments import AttentionPoolArgs
from condense_core.ops.backends import REGISTRY

here = Path(condense_core.__file__)
if "site-packages" not in here.parts:
    sys.exit(f"condense_core is imported from {here}, not from an installed wheel")

pure = "--pure" in sys.argv
if (native.missing() is None) == pure:
    sys.exit(f"the extension: {native.missing() or 'loaded'}, expected {'none' if pure else 'that it loads'}")

x, q = torch.randn(1750, 512), torch.randn(4, 128)
arguments = AttentionPoolArgs(
    x, q, ratio=4, cu_seqlens=None, halo=0, scale=1.0, norm_weight=None, window_bias=None, eps=1e-6
)
backend = REGISTRY.resolve("attention_pool", arguments).name
if backend != ("reference" if pure else "cpu"):
    sys.exit(f"attention_pool runs on {backend}")
torch.testing.assert_close(ops.attention_pool(x, q, ratio=4), reference.attention_pool(x, q, ratio=4))
scores = torch.randn(2, 8, 300)
if not torch.equal(ops.select(scores, 100)[0], reference.select(scores, 100)[0]):
    sys.exit("select differs from its specification")

soft = Condenser.from_pretrained(embedded_model_path()).compress("The price of the violet engine is 42. " * 20, ratio=4)
print(
    f"condense_core {condense_core.__version__}: {soft.num_context_tokens} tokens became {len(soft.embeds)} ({backend})"
)
