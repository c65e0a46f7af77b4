"""What a user would run instead, on the workloads of `bench.decode`: transformers and llama.cpp.

transformers gets `generate(num_return_sequences=k)`, which repeats the prompt k times. llama.cpp
decodes the prompt once, copies the sequence k times (its cells are shared) and decodes the k
samples as one batch, each with a sampler of its own, as llama.cpp's own examples do. It is driven
through llama-cpp-python's bindings, with a GGUF file that holds the same weights; neither it nor
the `gguf` package is a dependency of this project: `pip install llama-cpp-python gguf`.

Both sample at temperature 1 and neither ends early. llama.cpp takes Qwen3 shapes only.
"""

import ctypes
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.decode_load import Round, Workload
from models.config import hf_config
from models.transformer import Transformer


def peer(name: str, model: Transformer, load: Workload) -> Any:
    """The peer of this name, ready for its rounds. Raises ValueError for a model or a workload that
    it is not set up for, ImportError where it is not installed."""
    if name == "llama.cpp" and model.config.architecture != "qwen3":
        raise ValueError(f"{name}: only Qwen3 shapes are set up, not {model.config.architecture}")
    if load.levels != 1:
        raise ValueError(f"{name}: levels = {load.levels}; peers share one prompt or none")
    return Transformers(model, load) if name == "transformers" else LlamaCpp(model, load)


class Transformers:
    """transformers' `generate`."""

    name = "transformers"

    def __init__(self, model: Transformer, load: Workload) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.load = load
        values = hf_config(model.config) | {"eos_token_id": None, "pad_token_id": 0}
        before = torch.get_default_dtype()
        torch.set_default_dtype(model.head_weight.dtype)
        try:
            config = AutoConfig.for_model(values.pop("model_type"), **values)
            self.model = AutoModelForCausalLM.from_config(config).to(model.head_weight.device)
        finally:
            torch.set_default_dtype(before)
        self.model.eval()

    @torch.inference_mode()
    def round(self, seed: int) -> Round:
        """Sample once."""
        load, config = self.load, self.model.config
        prompts = [sum(p, ()) for p in load.prompts(config.vocab_size, seed)]
        ids = torch.tensor([prompts[0]] if load.sharing else prompts, device=self.model.device)
        started = time.perf_counter()
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            num_return_sequences=load.k if load.sharing else 1,
            max_new_tokens=load.new_tokens,
            min_new_tokens=load.new_tokens,
        )
        total = time.perf_counter() - started
        assert out.shape == (load.k, load.prefix + load.new_tokens), out.shape
        return Round(total, None, None, load.k * (load.new_tokens - 1))


class LlamaCpp:
    """llama.cpp through its C interface."""

    name = "llama.cpp"

    def __init__(self, model: Transformer, load: Workload) -> None:
        import llama_cpp

        self.load, self.vocab_size = load, model.config.vocab_size
        self.api = llama_cpp
        # A reference of our own: the bindings would drop the callback.
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path)
            options = llama_cpp.llama_model_default_params()
            options.use_mmap = False  # the file goes away
            options.n_gpu_layers = 999 if model.head_weight.is_cuda else 0
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise ValueError("llama.cpp did not load the GGUF file")
        prompts = 1 if load.sharing else load.k
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = load.prefix * prompts + load.k * (load.new_tokens + 1) + 64
        params.n_batch = params.n_ubatch = max(512, load.k)
        params.n_seq_max = load.k + 1
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError("llama.cpp did not make a context")
        self.batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self.batch_size = params.n_batch

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Decode (token, position, sequence, wants logits)."""
        for i, (token, position, sequence, logits) in enumerate(tokens):
            self.batch.token[i] = token
            self.batch.pos[i] = position
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = sequence
            self.batch.logits[i] = int(logits)
        self.batch.n_tokens = len(tokens)
        status = self.api.llama_decode(self.context, self.batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def round(self, seed: int) -> Round:
        """Sample once."""
        api, load = self.api, self.load
        memory = api.llama_get_memory(self.context)
        api.llama_memory_clear(memory, True)
        samplers = []
        for i in range(load.k):
            chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_temp(1.0))
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_dist(seed * load.k + i))
            samplers.append(chain)
        prompts = [sum(p, ()) for p in load.prompts(self.vocab_size, seed)]
        started = time.perf_counter()
        first: list[int] = []
        for sequence, prompt in enumerate(prompts if not load.sharing else prompts[:1]):
            work = [(t, i, sequence, i == load.prefix - 1) for i, t in enumerate(prompt)]
            for at in range(0, len(work), self.batch_size):
                self._decode(work[at : at + self.batch_size])
            if not load.sharing:
                first.append(api.llama_sampler_sample(samplers[sequence], self.context, -1))
        if load.sharing:
            first = [api.llama_sampler_sample(sampler, self.context, -1) for sampler in samplers]
            for sequence in range(1, load.k):
                api.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        prefilled = time.perf_counter()
        tokens = first
        for step in range(load.new_tokens - 1):
            at = load.prefix + step
            self._decode([(token, at, sequence, True) for sequence, token in enumerate(tokens)])
            tokens = [
                api.llama_sampler_sample(sampler, self.context, i)
                for i, sampler in enumerate(samplers)
            ]
        ended = time.perf_counter()
        for sampler in samplers:
            api.llama_sampler_free(sampler)
        decode_tokens = load.k * (load.new_tokens - 1)
        return Round(ended - started, prefilled - started, ended - prefilled, decode_tokens)


def write_gguf(model: Transformer, path: Path) -> None:
    """Write a Qwen3 model as GGUF without a vocabulary: matrices in the model's dtype, norms in
    float32."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(path), "qwen3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.v_head_dim)
    writer.add_rope_freq_base(config.rope[0].theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    kinds = {
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.float32: gguf.GGMLQuantizationType.F32,
    }

    def add(name: str, weight: torch.Tensor) -> None:
        weight = weight.detach().cpu().contiguous()
        if weight.ndim == 1:
            writer.add_tensor(name, weight.float().numpy())
            return
        raw = weight.view(torch.uint8).numpy() if weight.dtype != torch.float32 else weight.numpy()
        writer.add_tensor(name, np.ascontiguousarray(raw), raw_dtype=kinds[weight.dtype])

    add("token_embd.weight", model.embed_tokens.weight)
    add("output_norm.weight", model.norm.weight)
    if not config.tied:
        add("output.weight", model.head_weight)
    layers: Any = model.layers
    for i, layer in enumerate(layers):
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = attention.qkv_proj.weight.split(attention.sizes)
        gate, up = mlp.gate_up_proj.weight.chunk(2)
        for name, weight in {
            "attn_norm": layer.input_layernorm.weight,
            "attn_q": q,
            "attn_k": k,
            "attn_v": v,
            "attn_q_norm": attention.q_norm.weight,
            "attn_k_norm": attention.k_norm.weight,
            "attn_output": attention.o_proj.weight,
            "ffn_norm": layer.post_attention_layernorm.weight,
            "ffn_gate": gate,
            "ffn_up": up,
            "ffn_down": mlp.down_proj.weight,
        }.items():
            add(f"blk.{i}.{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
