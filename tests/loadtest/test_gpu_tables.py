"""The tables of docs/performance.md are those of the report that they name."""

from __future__ import annotations

from loadtest.gpu import GPU
from loadtest.gpu_report import EngineSpeed, GPUReport, KernelSpeed, StartTime
from loadtest.gpu_tables import DOCUMENT, read_report, render, section_of
from loadtest.machine import this_machine
from loadtest.step_timing import Decode, Prefill, Workload


def test_the_document_has_what_its_report_says() -> None:
    section, name = section_of(DOCUMENT.read_text())
    assert section == render(read_report(DOCUMENT.parent.parent / name), name)


def test_every_number_has_its_place() -> None:
    lines = render(small_report(), "x.json").splitlines()
    assert lines[0] == "<!-- begin: loadtest.gpu_tables of x.json -->"
    assert "The roof, measured just before: 3.02 TB/s and 700 TFLOP/s (cuBLAS, fp16, 8192^3)." in lines
    assert "| 8: 512/128 | 2,500 | 30,000 |" in lines
    assert "| 16: 2048/1 |  | 31,000 |" in lines
    assert "| batch | 1,024: us | 1,024: tok/s | 1,024: share | 4,096: us | 4,096: tok/s | 4,096: share |" in lines
    assert "| 1 | 2,000 | 500 | 70% | 2,500 | 400 | 60% |" in lines
    assert "| 256 | 9,000 | 28,444 | 65% | does not fit |  |  |" in lines
    assert "| tiny | 20,000 |  |" in lines
    assert "| large |  | 25,000 |" in lines
    assert "| 1 | 0.20 | 3.00 | 3.20 |" in lines
    assert "|  | 8 tokens | 64 tokens |" in lines
    assert "| tiny qkv | 4.5, 80% |  |" in lines
    assert "| tiny o |  | 1,234, 55% |" in lines
    assert "| greedy, hot | 7.0 |" in lines


def small_report() -> GPUReport:
    workloads = [
        Workload(
            batch=batch,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            seconds=1.0,
            prefill_tokens_per_s=prefill,
            output_tokens_per_s=1.0,
            decode_tokens_per_s=decode,
        )
        for batch, input_tokens, output_tokens, decode, prefill in (
            (8, 512, 128, 2500, 3e4),
            (16, 2048, 1, None, 3.1e4),
        )
    ]
    decode = [
        Decode(batch=batch, context=context, step_us=us, tokens_per_s=batch / us * 1e6, bandwidth_share=share)
        for batch, context, us, share in ((1, 1024, 2000, 0.7), (1, 4096, 2500, 0.6), (256, 1024, 9000, 0.65))
    ]
    engines = [
        EngineSpeed(
            model=model,
            kv_cache_tokens=1,
            workloads=workloads if model == "tiny" else [],
            prefill=[Prefill(tokens=tokens, seconds=1.0, tokens_per_s=speed)],
            decode=decode if model == "tiny" else [],
        )
        for model, tokens, speed in (("tiny", 512, 20_000), ("large", 2048, 25_000))
    ]
    kernels = [
        KernelSpeed(kernel=kernel, shape=shape, us=us, read_tb_per_s=1, tflop_per_s=1, roof_share=share)
        for kernel, shape, us, share in (
            ("int4_linear", "tiny o, 64 tokens", 1234, 0.55),
            ("int4_linear", "tiny qkv, 8 tokens", 4.5, 0.8),
            ("sample", "greedy, hot, 1 rows", 7.0, None),
        )
    ]
    return GPUReport(
        machine=this_machine(()),
        gpu=GPU(name="NVIDIA H100", driver="1", memory_mib=1, read_bandwidth=3.02e12, product_flops=7e14),
        kernels=kernels,
        engines=engines,
        starts=[StartTime(model="tiny", weight_bytes=1, stages={"imports": 0.2, "weights": 3.0}, total_s=3.2)],
    )
