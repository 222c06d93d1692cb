"""The plan for how networks run is a table: device, precision, compile mode, copies, offload and batch size."""

from dataclasses import replace

import pytest

from server.ensemble.optimization import OptimizationPlan, Options, Target, choose
from server.errors import CompileError

CPU = Target("cpu", "fp32", cpu_kernels=True)
OLD_CPU = replace(CPU, cpu_kernels=False)
CUDA = Target("cuda", "bf16")
HOPPER = replace(CUDA, convolution_kernels=True)
MPS = Target("mps", "fp16")
UNUSUAL = "UNet2DConditionModel has an unusual Transformer2DModel"

OFF, AUTO, BLOCKS = (Options(compile=mode) for mode in ("off", "auto", "blocks"))
SERVING = replace(BLOCKS, compile_while_serving=True)

CPU_OFF = OptimizationPlan("cpu", "eager")
CPU_KERNELS = OptimizationPlan("cpu", "cpu_kernels", fuse=True)
CUDA_OFF = OptimizationPlan("cuda", "eager", overlap=True)
CUDA_GRAPHS = OptimizationPlan("cuda", "cuda_graphs", fuse=True, overlap=True)


@pytest.mark.parametrize(
    ("options", "target", "plan"),
    [
        (OFF, CPU, CPU_OFF),
        (AUTO, CPU, CPU_KERNELS),
        (BLOCKS, CPU, CPU_KERNELS),
        (AUTO, OLD_CPU, CPU_OFF),
        (BLOCKS, OLD_CPU, OptimizationPlan("cpu", "torch_compile")),
        (AUTO, replace(CPU, unsupported=UNUSUAL), CPU_OFF),
        (BLOCKS, replace(CPU, unsupported=UNUSUAL), OptimizationPlan("cpu", "torch_compile")),
        (AUTO, replace(CPU, precision="bf16"), CPU_OFF),
        (BLOCKS, replace(CPU, precision="bf16"), OptimizationPlan("cpu", "torch_compile")),
        (replace(AUTO, offload=True), CPU, replace(CPU_OFF, offload="always")),
        (replace(OFF, max_batch=4), CPU, replace(CPU_OFF, batch_invariant=True)),
        (replace(AUTO, max_batch=4), CPU, replace(CPU_KERNELS, batch_invariant=True)),
        (replace(AUTO, overlap=True), CPU, replace(CPU_KERNELS, overlap=True)),
        (OFF, replace(CPU, precision="fp8"), replace(CPU_OFF, fuse=True, quantize=True, offload="until_quantized")),
        (AUTO, replace(CPU, precision="fp8"), replace(CPU_OFF, fuse=True, quantize=True, offload="until_quantized")),
        (BLOCKS, replace(CPU, precision="fp8"), replace(CPU_KERNELS, quantize=True, offload="until_quantized")),
        (OFF, CUDA, CUDA_OFF),
        (AUTO, CUDA, CUDA_OFF),
        (BLOCKS, CUDA, CUDA_GRAPHS),
        (SERVING, CUDA, replace(CUDA_GRAPHS, shared_weight_copies=True)),
        (OFF, replace(CUDA, unsupported=UNUSUAL), CUDA_OFF),
        (replace(OFF, offload=True), CUDA, replace(CUDA_OFF, offload="always", overlap=False)),
        (replace(OFF, overlap=False), CUDA, replace(CUDA_OFF, overlap=False)),
        (replace(OFF, max_batch=4), HOPPER, replace(CUDA_OFF, batch_invariant=True)),
        (BLOCKS, HOPPER, CUDA_GRAPHS),
        (replace(BLOCKS, max_batch=4), CUDA, replace(CUDA_GRAPHS, batch_invariant=True)),
        (
            replace(BLOCKS, max_batch=4),
            HOPPER,
            replace(CUDA_GRAPHS, batch_invariant=True, convolution_kernels=True),
        ),
        (OFF, replace(CUDA, precision="fp8"), replace(CUDA_OFF, fuse=True, quantize=True, offload="until_quantized")),
        (BLOCKS, replace(CUDA, precision="fp8"), replace(CUDA_GRAPHS, quantize=True, offload="until_quantized")),
        (SERVING, replace(CUDA, precision="fp8"), replace(CUDA_GRAPHS, quantize=True, offload="until_quantized")),
        (
            replace(OFF, offload=True),
            replace(CUDA, precision="fp8"),
            replace(CUDA_OFF, fuse=True, quantize=True, offload="always", overlap=False),
        ),
        (AUTO, MPS, OptimizationPlan("mps", "eager")),
        (BLOCKS, MPS, OptimizationPlan("mps", "torch_compile")),
    ],
    ids=str,
)
def test_the_plan_follows_from_options_and_target(options: Options, target: Target, plan: OptimizationPlan):
    assert choose(options, target) == plan


@pytest.mark.parametrize(
    ("options", "target", "message"),
    [
        (SERVING, CPU, "--compile-while-serving is for CUDA, and the device is cpu; leave it out"),
        (SERVING, MPS, "--compile-while-serving is for CUDA, and the device is mps; leave it out"),
        (BLOCKS, replace(CUDA, unsupported=UNUSUAL), f"{UNUSUAL}; leave --compile off, and --precision auto"),
        (
            OFF,
            replace(CUDA, precision="fp8", unsupported=UNUSUAL),
            f"{UNUSUAL}; leave --compile off, and --precision auto",
        ),
        (
            BLOCKS,
            replace(OLD_CPU, precision="fp8"),
            "--precision fp8 has no compiled calls on this device; leave --compile off",
        ),
        (replace(BLOCKS, offload=True), CUDA, "--offload moves networks about, so leave --compile off"),
    ],
    ids=str,
)
def test_a_plan_that_cannot_run_is_refused_with_the_flag_to_change(options: Options, target: Target, message: str):
    with pytest.raises(CompileError) as refused:
        choose(options, target)
    assert str(refused.value) == message


def test_compiled_calls_are_described_with_their_sizes_except_for_cpu_kernels():
    sizes = [(1024, 1024), (1152, 896)]
    assert [plan.describe(sizes) for plan in (CPU_OFF, CPU_KERNELS, CUDA_GRAPHS)] == [
        "off",
        "blocks for all sizes",
        "blocks for 1024x1024, 1152x896",
    ]
