"""What padding does to ChatGLM3's logits at full width: `python -m tests.full_padding [N_LAYER]`.

Makes a checkpoint of the real shapes but for its number of layers (random weights), converts it with
and without padding, and prints a line a file: KL divergence from the unpadded F16 file, share of equal
top ids, largest difference of a log probability, bytes. Not a test: it needs 5 GB of memory and a minute.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np

from convert.quantize import quantize
from engine.registry import model
from tests.checkpoints import make_checkpoint
from tests.test_logits import log_softmax, run

N_IDS = 256


def main(n_layer: int) -> None:
    """Print the four lines."""
    shape = dataclasses.replace(model("chatglm3-6b").shape, n_layer=n_layer)
    ids = np.random.default_rng(3).integers(0, 60000, N_IDS).tolist()
    with tempfile.TemporaryDirectory(prefix="fourbit-padding-") as work:
        checkpoint = make_checkpoint(Path(work, "c"), "chatglm3", shape=shape)
        exact = None
        for ftype in ("F16", "Q4_K_M"):
            for pad in (False, True):
                path = quantize(checkpoint, Path(work, f"{ftype}-{pad}.gguf"), ftype, pad_ff=pad).path
                found = log_softmax(run(path, ids))
                exact = found if exact is None else exact
                kl = (np.exp(exact) * (exact - found)).sum(axis=-1).mean()
                same = (found.argmax(axis=-1) == exact.argmax(axis=-1)).mean()
                most = np.abs(found - exact).max()
                n_bytes = path.stat().st_size
                print(f"{ftype} padded={pad}: KL {kl:.6f}, same top {same:.3f}, at most {most:.4f}, {n_bytes} bytes")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
