"""Operations of the transformer, the sampler, training and the vote, each beside its reference.

    operation            file                   implementations       gradient
    forest_attention     forest_attention/      torch, C++, Triton    torch, C++, Triton
    merge_states         merge_states.py        torch, Triton
    segment_attention    segment_attention.py   forest_attention, flash-attn, xformers
    rms_norm, rope,      a file each            torch, C++, Triton    torch, Triton
      gated_act
    norm_rope_write      norm_rope_write.py     torch, C++, Triton
    route, moe           a file each            torch, C++, Triton    torch, Triton
    matmul               matmul.py              torch, Triton
    packed_linear        packed_linear.py       C++
    sample_token         sample_token.py        torch, C++, Triton
    accept_token         accept_token.py        torch, C++, Triton
    expected_score       expected_score.py      torch, C++, Triton
    log-probs, losses    logprob/               torch, Triton         torch, Triton
    vote                 vote.py                torch

`extract_scores` is accept_token's automaton; `target`, `launch`, `checks`, `device`, `device_math`
serve all; `cpp` builds and calls C++. An operation runs in Triton on a GPU, else in C++ or torch.
"""
