"""How fast the kernels are: `python -m sinkjax_kernels.bench schedule | time | splash-blocks`.

schedule, limits, splash: cycles of TPU kernels from the compiler's final schedule, no device needed.
llo, walk: that schedule, read and followed. worker, pool: compilation, one process per chip.
timing, contestants: measured on the device that is there. chips: what a chip can do. table: output.
"""
