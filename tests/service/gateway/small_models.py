"""Model directories of a few kilobytes, with real tokenizers of the two families, trained here."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CONTEXT_LENGTH = 512
VOCAB_ROOM = 16  # ids beyond the tokenizer's, as in checkpoints with a padded vocabulary

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "Größe, Übermut und ein süßer Café-Crème: naïve façades.",
    "日本語のテキストと中文文本，以及한국어。",
    "emoji 😀😃🎉👩‍👩‍👧‍👦 and math ∑∫√ — “quotes”…",
    "def f(x):\n    return {'a': [1, 2, 3]}  # indented\n\n\n\tend",
]


def byte_level_tokenizer() -> Tokenizer:
    """GPT-2's kind: every byte is a token, merges make longer ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", special=False), AddedToken("é plain", special=False)])
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """Llama 2's kind: U+2581 for spaces, `<0xE9>` for bytes of characters that the vocabulary lacks."""
    base = Tokenizer(models.BPE(unk_token="<unk>"))
    base.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    base.train_from_iterator(CORPUS[:1] * 5, trainer)
    trained = json.loads(base.to_str())["model"]
    vocab = dict(trained["vocab"])
    for token in [f"<0x{byte:02X}>" for byte in range(256)] + ["▁▁", "▁▁▁▁", "日", "▁é"]:
        vocab.setdefault(token, len(vocab))
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = base.normalizer
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def write_model(directory: Path, tokenizer: Tokenizer, eos_token: str, template: str | None = CHATML) -> Path:
    """The three files that a gateway reads."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer_config = {"eos_token": eos_token, "chat_template": template}
    config = {
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size() + VOCAB_ROOM,
        "max_position_embeddings": CONTEXT_LENGTH,
        "eos_token_id": tokenizer.token_to_id(eos_token),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (directory / "config.json").write_text(json.dumps(config))
    return directory
