"""The specification of attention with sinks, and its kernels. Arrays in, arrays out.

Users reach all of this through `sinkjax.ops`; this package imports jax and jaxtyping only.

    normalizers   descriptions of logits → weights, and their float32 meaning
    masks         visibility as data
    flash/        training and prefill attention, forward and backward
    decode/       a few queries against a ring cache
    statistics/   attention mass, entropy and maximum logit without the [T, S] matrix

Letters: B batch, T query length, S key length, N query heads, K key/value heads, G = N/K, H head size.
"""
