"""Operations of the transformer, the sampler, training and the vote, each beside its reference.

    rms_norm, rope, gated_act, write_kv       torch, C++, Triton
    forest_attention/                         torch, C++, Triton; with merge_states
    matmul                                    Triton; packed_linear: C++
    sample_token, accept_token                torch, C++, Triton; extract_scores is their automaton
    logprob/                                  torch, Triton; log-probs and the policy losses
    vote                                      torch

`target`, `launch`, `checks`, `device` and `device_math` serve them all; `cpp` builds and calls C++.

Importing this package asks MKL for its strict mode, unless the environment says otherwise: without
it, row results of a matrix product depend on the number of rows on processors without AVX-512.
"""

import os

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
