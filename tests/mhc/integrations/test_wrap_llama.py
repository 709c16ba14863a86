"""mhc.wrap on the models of Hugging Face transformers: Llama, Qwen3, Mistral and Mixtral.

What a wrapped layer of their build does in itself is in test_wrap.py, with a small model of that build.
"""

from typing import Any

import pytest
import torch

import mhc

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and its libraries' own

FAMILIES = ("Llama", "Qwen3", "Mistral", "Mixtral")
VOCABULARY, SLIDING_WINDOW = 97, 6
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
MORE: dict[str, dict[str, Any]] = {
    "Qwen3": {"use_sliding_window": True, "sliding_window": SLIDING_WINDOW, "max_window_layers": 1},
    "Mistral": {"sliding_window": SLIDING_WINDOW},
    "Mixtral": {"num_local_experts": 4},
}
LIKE = {"rtol": 1e-4, "atol": 1e-5}
"""Float32 through 4 sublayers, sums in another order."""


def build(family: str, **settings: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | MORE.get(family, {}) | settings)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def prompts() -> dict[str, torch.Tensor]:
    """Two prompts of 11 tokens, the second of them padded on its left."""
    tokens, mask = torch.randint(VOCABULARY, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[1, :3] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def blocks_of(model: torch.nn.Module) -> list[mhc.HyperConnection]:
    return [module for module in model.modules() if isinstance(module, mhc.HyperConnection)]


def opened(model: Any) -> Any:
    """The maps far from where they start."""
    with torch.no_grad():
        for block in blocks_of(model):
            for parameter in (block.alpha, block.bias):
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def outcome(model: Any, given: dict[str, torch.Tensor]) -> Any:
    """All that a forward gives, of Mixtral with its router's logits, which then are part of the loss."""
    router = {"output_router_logits": True} if model.config.model_type == "mixtral" else {}
    return model(**given, labels=given["input_ids"], **router)


def gradients(model: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    outcome(model, given).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("manifold", ["sinkhorn", "identity"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrapped_model_is_the_model(family: str, manifold: str) -> None:
    model, given = build(family), prompts()
    generation = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted, written = outcome(model, given), model.generate(**given, **generation)
    mhc.wrap(model, 4, manifold=manifold)
    assert [block.manifold for block in blocks_of(model)] == [manifold] * 4
    found = outcome(model, given)
    torch.testing.assert_close(found.logits, wanted.logits, **LIKE)
    torch.testing.assert_close(found.loss, wanted.loss, **LIKE)
    if family == "Mixtral":
        torch.testing.assert_close(found.router_logits, wanted.router_logits, **LIKE)
        torch.testing.assert_close(found.aux_loss, wanted.aux_loss, **LIKE)
    assert torch.equal(model.generate(**given, **generation), written), "with the cache of keys and values"


@pytest.mark.parametrize("manifold", ["sinkhorn", "identity"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_flow_and_are_the_same_with_gradient_checkpointing(family: str, manifold: str) -> None:
    model, given = opened(mhc.wrap(build(family), 4, manifold=manifold)).train(), prompts()
    found = gradients(model, given)
    unmoved = {name for name, grad in found.items() if not grad.any()}
    # all streams are equal before the first block, whose res is thus of no account, but not its pre and post
    assert not unmoved, f"of {len(found)} parameters"
    model.gradient_checkpointing_enable()
    for name, grad in gradients(model, given).items():
        torch.testing.assert_close(grad, found[name], **LIKE)


def test_a_frozen_model_is_finetuned_through_its_connections() -> None:
    model = build("Llama")
    frozen = [parameter.requires_grad_(False).clone() for parameter in model.parameters()]
    kept, given = list(model.parameters()), prompts()
    mhc.wrap(model, 4, manifold="identity").train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 3 * len(blocks_of(model)), "phi, alpha and bias"
    optimizer, losses = torch.optim.Adam(trained, lr=0.05), []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(model(**given, labels=given["input_ids"]).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(parameter, before) for parameter, before in zip(kept, frozen, strict=True))


def test_what_transformers_records_of_a_wrapped_model() -> None:
    model, given = build("Mixtral", attn_implementation="eager"), prompts()
    asked = {"output_attentions": True, "output_hidden_states": True, "output_router_logits": True}
    wanted = model(**given, **asked)
    found = mhc.wrap(model)(**given, **asked)
    torch.testing.assert_close(found.attentions, wanted.attentions, **LIKE)
    torch.testing.assert_close(found.router_logits, wanted.router_logits, **LIKE)
    assert (len(wanted.hidden_states), found.hidden_states) == (3, ()), "layers that are replaced are not recorded"


def test_scaled_residuals_are_refused() -> None:
    import transformers

    model = transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, residual_multiplier=0.22))
    with pytest.raises(mhc.BadInput, match="another result from GraniteDecoderLayer"):
        mhc.wrap(model)
