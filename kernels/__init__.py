"""Operations of the transformer, the sampler and the vote: one per file, each beside its reference.

Importing this package asks MKL for its strict mode, unless the environment says otherwise: without
it, row results of a matrix product depend on the number of rows on processors without AVX-512.
"""

import os

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
