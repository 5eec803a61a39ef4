"""Kernels into groups."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mtl_lora_cli.bench.breakdown import (
    ADAPTER,
    BASE,
    OTHER,
    SHOWN_KERNELS,
    Kernel,
    _cuda_kernels,
    group_of,
    summarise,
)
from mtl_lora_cli.bench.case import Measuring, run_case
from mtl_lora_cli.bench.cases import Case


@pytest.mark.parametrize(
    ("name", "side", "group"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", None, BASE),
        ("nvjet_tst_64x8_64x16_1x1_h_bz_TNN", 24, ADAPTER),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", 1024, BASE),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", 8, ADAPTER),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", None, BASE),
        ("void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::bfloat16_t>", None, "attention"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", None, "NF4 expansion"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<>", None, "optimizer"),
        ("_gated_gradient", None, "gated activation"),
        ("_attention_forward", None, "attention"),
        ("_attention_backward_keys", None, "attention"),
        ("_adapter_mix_gradient", None, ADAPTER),
        ("_nf4_expand", None, "NF4 expansion"),
        ("_fp8_rows", None, "FP8 conversion"),
        ("_logit_gradient", None, "loss"),
        ("_add_norm", None, "norm"),
        ("_rotary_kernel", None, "rotary"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>", None, "elementwise and copies"),
        ("Memcpy HtoD (Pinned -> Device)", None, "elementwise and copies"),
        ("aten::addmm", 64, BASE),
        ("aten::mm", 8, ADAPTER),
        ("something else", None, OTHER),
    ],
)  # fmt: skip
def test_groups(name: str, side: int | None, group: str) -> None:
    assert group_of(name, side, smallest_base=64) == group


def test_a_summary_adds_up() -> None:
    kernels = [
        Kernel("a", BASE, 6000.0, 4),
        Kernel("b", ADAPTER, 1000.0, 2),
        Kernel("c", BASE, 2000.0, 2),
        Kernel("d", OTHER, 500.0, 2),
    ]
    found = summarise(kernels, steps=2, step_seconds=0.01)
    assert found["step_ms"] == 10
    assert found["kernel_ms"] == pytest.approx(4.75)
    assert found["idle_ms"] == pytest.approx(5.25)
    assert [(one["group"], one["ms"]) for one in found["groups"]] == [
        (ADAPTER, 0.5),
        (BASE, 4.0),
        (OTHER, 0.25),
    ]
    assert sum(one["share"] for one in found["groups"]) == pytest.approx(0.475)
    assert [one["name"] for one in found["kernels"]] == ["a", "c", "b", "d"]
    assert found["kernels"][0] == {"name": "a", "group": BASE, "ms": 3.0, "count": 2.0}


def test_one_kernel_for_large_and_small_products() -> None:
    """The card's events give the time, the operations that asked for them the sizes."""
    card, cpu = SimpleNamespace(name="CUDA"), SimpleNamespace(name="CPU")

    def launched(shape: list[int], duration: float) -> list[SimpleNamespace]:
        kernel = SimpleNamespace(name="nvjet_gemm", duration=duration)
        span = SimpleNamespace(elapsed_us=lambda: duration)
        shapes = [shape, [], [[3, 4], [5, 6]]]
        return [
            SimpleNamespace(
                name="aten::mm", device_type=cpu, kernels=[kernel], input_shapes=shapes
            ),
            SimpleNamespace(name="nvjet_gemm", device_type=card, kernels=[], time_range=span),
        ]

    events = [*launched([512, 64], 100.0), *launched([512, 8], 7.0), *launched([512, 8], 8.0)]
    marker = SimpleNamespace(elapsed_us=lambda: 1e6)
    events.append(
        SimpleNamespace(
            name="Optimizer.step#AdamW.step",
            device_type=card,
            kernels=[],
            time_range=marker,
            is_user_annotation=True,
        )
    )
    assert sorted(_cuda_kernels(events, smallest_base=64), key=lambda k: k.group) == [
        Kernel("nvjet_gemm", ADAPTER, 15.0, 2),
        Kernel("nvjet_gemm", BASE, 100.0, 1),
    ]


def test_of_a_case(tiny: Case, measuring: Measuring) -> None:
    how = Measuring(**{**vars(measuring), "breakdown": True, "steps": 1, "warmup": 0})
    found = run_case(tiny, how)["breakdown"]
    groups = {one["group"] for one in found["groups"]}
    assert {BASE, ADAPTER, "attention", "optimizer"} <= groups
    assert found["kernel_ms"] == pytest.approx(sum(one["ms"] for one in found["groups"]))
    assert found["idle_ms"] == pytest.approx(max(0.0, found["step_ms"] - found["kernel_ms"]))
    assert len(found["kernels"]) == SHOWN_KERNELS
