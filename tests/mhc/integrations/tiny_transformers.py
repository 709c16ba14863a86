"""Tiny models of transformers with hyper-connections, and how results of a patched one are compared."""

import torch

VOCABULARY, TOKENS = 97, 12
LOGITS, GRADIENTS = 3e-6, 2e-4
"""How far a patched model may be off in float32: of the largest logit, and of a gradient's norm."""

NOISE = 1e-7
"""Of the norm of all gradients: one below it is zero but for rounding, as V4's hash router's."""

MLA = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
INDEXER = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def sizes(hidden, layers):
    shared = {"vocab_size": VOCABULARY, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "max_position_embeddings": 128}
    return shared | special | INDEXER | EXPERTS


def deepseek_v4(transformers, hidden=64, layers=2, **settings):
    attention = {"head_dim": 16, "partial_rotary_factor": 0.5, "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 16}
    kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    rates = {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}
    schedule = {
        "layer_types": [kinds[index % 3] for index in range(layers)],
        "compress_rates": rates,
        "mlp_layer_types": ["hash_moe", *["moe"] * (layers - 1)],
        "sliding_window": 8,
    }
    config = transformers.DeepseekV4Config(**sizes(hidden, layers) | attention | schedule | settings)
    return transformers.DeepseekV4ForCausalLM(config)


def glm5_next(transformers, hidden=64, **settings):
    text = sizes(hidden, 2) | MLA | {"num_key_value_heads": 4, "intermediate_size": 64, "index_kpool": 2}
    text |= {"linear_head_dim": 16, "linear_num_heads": 4, "layer_types": ["linear_attention", "indexed_attention"]}
    text |= {"mlp_layer_types": ["dense", "sparse"]} | settings
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": hidden, "intermediate_size": 32}
    vision |= {"projection_intermediate_size": 32}
    names = ("image_token", "video_token", "image_start_token", "image_end_token")
    special = {f"{name}_id": 90 + index for index, name in enumerate((*names, "video_start_token", "video_end_token"))}
    config = transformers.Glm5NextConfig(text_config=text, vision_config=vision, **special)
    return transformers.Glm5NextForConditionalGeneration(config)


def hunyuan_text(hidden):
    return sizes(hidden, 2) | MLA | {"num_key_value_heads": 4, "intermediate_size": 64, "qk_rope_head_dim": 8}


def hy_v4(transformers, hidden=64, **settings):
    return transformers.HYV4ForCausalLM(transformers.HYV4Config(**hunyuan_text(hidden), hc_magnitude=1.5, **settings))


def hy_v4_vl(transformers, hidden=64, **settings):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision |= {"out_hidden_size": hidden, "max_image_size": 64}
    text = hunyuan_text(hidden) | {"rope_parameters": rope} | settings
    config = transformers.HYV4VLConfig(text_config=text, vision_config=vision, image_token_id=90, video_token_id=91)
    return transformers.HYV4VLForConditionalGeneration(config)


FAMILIES = {make.__name__: make for make in (deepseek_v4, glm5_next, hy_v4, hy_v4_vl)}


def randomised(model, seed=0):
    """The model with hyper-connections that do something: as they are initialised, streams stay nearly alike."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_hc." in name or "hc_head." in name:
                drawn = torch.randn(parameter.shape, generator=random)
                parameter.copy_(0.1 * drawn if parameter.dim() == 2 else drawn)
    return model


def made(transformers, family, **settings):
    torch.manual_seed(0)
    return randomised(FAMILIES[family](transformers, **settings))


def text_model(model):
    """The module that runs the layers."""
    return next(module for module in model.modules() if hasattr(module, "layers"))


def batch(seed=0, rows=2):
    """Token ids without special ones."""
    return torch.randint(3, 80, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))


def outcome(model, ids):
    """Loss, logits and all gradients by name."""
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    return out.loss.item(), out.logits.detach(), gradients(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def off(found, wanted):
    return ((found.float() - wanted.float()).abs().max() / wanted.float().abs().max()).item()


def expect_same_gradients(found, wanted):
    """Equal; where there was none, a compiler or FSDP may have made one of zeros."""
    assert found.keys() >= wanted.keys()
    assert not any(found[name].any() for name in found.keys() - wanted.keys())
    noise = NOISE * torch.stack([grad.norm() for grad in wanted.values()]).norm()
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= GRADIENTS * grad.norm() + noise, name


def expect_same(found, wanted):
    assert abs(found[0] - wanted[0]) <= LOGITS * abs(wanted[0])
    assert off(found[1], wanted[1]) <= LOGITS
    expect_same_gradients(found[2], wanted[2])
