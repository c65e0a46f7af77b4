"""Operations of the transformer, the sampler, the vote and the losses.

Each has a reference, `..._ref`, and runs in Triton on a GPU. On CPU it runs in C++ where that can
be built and is written, else in torch.

    operation           file                  implementations      gradient
    forest_attention    forest_attention/     torch, C++, Triton   torch, Triton
    merge_states        merge_states.py       torch, Triton
    segment_attention   segment_attention.py  forest_attention, flash-attn, xformers
    write_kv            write_kv.py           torch, C++, Triton
    rms_norm            rms_norm.py           torch, C++, Triton   torch, Triton
    rope                rope.py               torch, C++, Triton   torch, Triton
    gated_act           gated_act.py          torch, C++, Triton   torch, Triton
    matmul              matmul.py             torch, Triton
    packed_linear       packed_linear.py      C++
    sample_token        sample_token.py       torch, C++, Triton
    take_token          take_token.py         torch, C++, Triton
    extract_scores      extract_scores.py     torch, Triton
    vote                vote.py               torch, Triton
    log-probs, losses   logprob/              torch, Triton        torch, Triton

`launch.py` runs Triton kernels, `cpp/` builds and calls the C++, `device_math.py` holds functions
of Triton kernels.
"""
