"""Time and memory that quantising takes, by layer, on random weights in the shape of Llama 3 8B.

    python -m loadtest.quantize_speed --device cuda --num-layers 3

A layer's cost depends on shapes alone, so that a model's is its layers' times their number (reading weights apart).
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from loadtest.random_model import SHAPES
from nibble.engine.model_config import ModelConfig
from nibble.engine.quantize.decoder import Layer
from nibble.engine.quantize.layer import LayerQuantizer
from nibble.engine.quantize.options import Method

LLAMA_3_8B = SHAPES["llama-3-8b"].config
BATCH_SEQUENCES = 8


def random_layer(config: ModelConfig, device: torch.device) -> Layer:
    """Weights of unit gain."""
    hidden, heads = config.hidden_size, config.num_heads * config.head_dim
    kv, intermediate = config.num_kv_heads * config.head_dim, config.intermediate_size
    shapes = {"q": (heads, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, heads)}
    shapes |= {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    layer = {name: torch.randn(shape, device=device) * shape[1] ** -0.5 for name, shape in shapes.items()}
    return layer | {name: torch.ones(hidden, device=device) for name in ("attention_norm", "mlp_norm")}


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--method", type=Method, choices=list(Method)[1:], default=Method.AWQ_GPTQ)
    parser.add_argument("--num-layers", type=int, default=3)
    parser.add_argument("--num-sequences", type=int, default=128)
    parser.add_argument("--sequence-tokens", type=int, default=512)
    arguments = parser.parse_args()
    device, config = torch.device(arguments.device), LLAMA_3_8B
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    with torch.inference_mode():
        counts = [BATCH_SEQUENCES] * (arguments.num_sequences // BATCH_SEQUENCES)
        shape = (arguments.sequence_tokens, config.hidden_size)
        batches = [torch.randn(count, *shape, device=device) for count in counts]
        quantizer = LayerQuantizer(batches, config, arguments.method, 128, dtype)
        del batches
        for index in range(arguments.num_layers):
            layer = random_layer(config, device)
            start_s = time.perf_counter()
            quantizer.quantize(layer)
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            seconds, gib = time.perf_counter() - start_s, _peak_bytes(device) / (1 << 30)
            print(f"layer {index}: {seconds:.2f} s, peak {gib:.1f} GiB", flush=True)  # noqa: T201 - a command's output


if __name__ == "__main__":
    main()
