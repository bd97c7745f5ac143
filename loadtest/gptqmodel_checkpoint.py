"""A model quantised by GPTQModel, a public quantiser, on the calibration sequences that `nibble quantize` would take.

For `loadtest.quantization_quality`, in a row beside Nibble's own methods. GPTQModel is no dependency of Nibble's
(`pip install gptqmodel`, here 7.6.0): GPTQ with its own order of columns and its own defaults, 4 bits, zero points. Its
thread pools want more than the one worker that it gives them on two cores.

python -m loadtest.gptqmodel_checkpoint PERMUTED OUT --calibration TEXT
python -m loadtest.quantization_quality PERMUTED OUT --text wiki.test.raw
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from nibble.engine.quantize.calibration import read_texts, token_sequences
from nibble.engine.quantize.options import Options

_BATCH = 4  # sequences at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="a Hugging Face directory")
    parser.add_argument("output", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--num-sequences", type=int, default=Options.num_sequences)
    arguments = parser.parse_args()
    from gptqmodel import GPTQModel, QuantizeConfig

    ids = token_sequences(
        read_texts(arguments.calibration),
        arguments.model / "tokenizer.json",
        arguments.num_sequences,
        Options.sequence_tokens,
    )
    examples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = QuantizeConfig(bits=4, group_size=arguments.group_size, sym=False)
    model = GPTQModel.load(str(arguments.model), config, device=device)
    model.quantize(examples, batch_size=_BATCH)
    model.save(str(arguments.output))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(arguments.model / name, arguments.output)


if __name__ == "__main__":
    main()
