"""A ladder's results as JSON and as one HTML page with plots. No scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass

import msgspec

from nibble.engine.evaluate.ladder import Measures
from nibble.engine.evaluate.speed import BATCH

MIB = 1 << 20
LABELS = (
    "weights + KV cache",
    "perplexity",
    "mean KL",
    "99th percentile KL",
    "top-1 agreement",
    "generation agreement",
    "weights, MiB",
    "KV bytes per token",
    "tokens that fit",
    "tokens/s, one request",
    f"tokens/s, {BATCH} at once",
)
_BAR_WIDTH, _BAR_HEIGHT, _LABEL_WIDTH, _VALUE_WIDTH = 360, 22, 190, 90  # pixels

_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } td, th { padding: .3em .7em; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; white-space: nowrap; }
.best { background: #e8f4e8; } svg text { font-size: 13px; }"""


@dataclass(frozen=True)
class Subject:
    """What was measured, and on what. quantized: the 4-bit checkpoint. text: a file's name. device: cpu or cuda."""

    model: str
    quantized: str
    text: str
    num_sequences: int
    sequence_tokens: int
    generated_tokens: int
    device: str

    def __str__(self) -> str:
        return (
            f"Predictions on {self.num_sequences} sequences of {self.sequence_tokens} tokens of {self.text}; "
            f"{self.generated_tokens} tokens generated from each prompt. INT4 weights: {self.quantized}. "
            f"Device: {self.device}."
        )


def to_json(subject: Subject, results: list[Measures], best: Measures, max_mean_kl: float) -> bytes:
    value = {
        **asdict(subject),
        "max_mean_kl": max_mean_kl,
        "recommended": best.name,
        "rungs": [asdict(each) for each in results],
    }
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def cells(each: Measures) -> tuple[str, ...]:
    """One row of the table, under LABELS."""
    quality = each.quality
    return (
        each.name,
        f"{quality.perplexity:.3f}",
        f"{quality.mean_kl:.5f}",
        f"{quality.p99_kl:.4f}",
        f"{quality.top1_agreement:.2%}",
        f"{each.generation_agreement:.1%}",
        f"{each.weight_bytes / MIB:,.1f}",
        f"{each.kv_token_bytes:,.0f}",
        "" if each.tokens_that_fit is None else f"{each.tokens_that_fit:,}",
        f"{each.tokens_per_s_alone:,.1f}",
        f"{each.tokens_per_s_batch:,.1f}",
    )


def to_html(subject: Subject, results: list[Measures], best: Measures, max_mean_kl: float) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in LABELS)
    rows = "".join(
        f"<tr{' class=best' if each is best else ''}>"
        + "".join(f"<td>{html.escape(c)}</td>" for c in cells(each))
        + "</tr>"
        for each in results
    )
    plots = "".join(
        _bars(name, [each.name for each in results], values)
        for name, values in (
            ("Mean KL divergence from the first rung, nats", [each.quality.mean_kl for each in results]),
            ("Perplexity", [each.quality.perplexity for each in results]),
            ("Weights, MiB", [each.weight_bytes / MIB for each in results]),
            ("Tokens per second, one request at a time", [each.tokens_per_s_alone for each in results]),
        )
    )
    name = html.escape(subject.model)
    return (
        f"<!DOCTYPE html><html lang=en><meta charset=utf-8><title>{name}</title><style>{_STYLE}</style>"
        f"<h1>{name}</h1><p>Recommended within a mean KL divergence of {max_mean_kl:g}: "
        f"<b>{html.escape(best.name)}</b>.<p>{html.escape(str(subject))}<table><tr>{head}</tr>{rows}</table>{plots}</html>\n"
    )


def _bars(title: str, labels: list[str], values: list[float]) -> str:
    scale = _BAR_WIDTH / (max(values) or 1.0)
    bars = "".join(
        f'<text x="0" y="{y + 16}">{html.escape(label)}</text>'
        f'<rect x="{_LABEL_WIDTH}" y="{y + 3}" width="{value * scale:.1f}" height="{_BAR_HEIGHT - 6}" fill="#4878a8"/>'
        f'<text x="{_LABEL_WIDTH + value * scale + 6:.1f}" y="{y + 16}">{value:,.4g}</text>'
        for y, label, value in zip(range(0, len(values) * _BAR_HEIGHT, _BAR_HEIGHT), labels, values, strict=True)
    )
    width, height = _LABEL_WIDTH + _BAR_WIDTH + _VALUE_WIDTH, len(values) * _BAR_HEIGHT
    return f'<h2>{html.escape(title)}</h2><svg width="{width}" height="{height}">{bars}</svg>'
